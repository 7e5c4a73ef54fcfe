// The addition of add_rms_norm with every instruction set of this machine against single precision; its norm is that of
// rms_norm.cpp.
#include "firp/cpu/row.h"
#include "test.h"

namespace firp::test {
namespace {

template <typename T>
void one_case(uint64_t seed) {
  Random random(seed);
  const int64_t width = random.choice({1, 3, 4, 15, 16, 17, 64, 100, 576});
  std::vector<T> hidden = normals<T>(random, width);
  const std::vector<T> residual = normals<T>(random, width);
  hidden[random.below(width)] = number<T>(NAN);
  for (const cpu::Isa isa : instruction_sets()) {
    std::vector<T> sum(width, number<T>(-7.0f));
    cpu::add(isa, hidden.data(), residual.data(), width, sum.data());
    for (int64_t i = 0; i < width; ++i) {
      const T exact = number<T>(cpu::to_float(hidden[i]) + cpu::to_float(residual[i]));
      const bool same = std::memcmp(&sum[i], &exact, sizeof(T)) == 0;
      CHECK(std::isnan(real(exact)) ? std::isnan(real(sum[i])) : same, seed, cpu::isa_name(isa), i);
    }
  }
}

}  // namespace
}  // namespace firp::test

int main() {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    firp::test::one_case<float>(seed);
    firp::test::one_case<firp::cpu::bfloat16>(seed);
  }
}
