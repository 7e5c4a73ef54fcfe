// rms_norm with every instruction set of this machine against double precision.
#include "firp/cpu/row.h"
#include "test.h"

namespace firp::test {
namespace {

template <typename T>
void one_case(uint64_t seed, double rounding) {
  Random random(seed);
  const int64_t width = random.choice({1, 3, 4, 15, 16, 17, 64, 100, 576});
  const std::vector<T> input = normals<T>(random, width), weight = normals<T>(random, width);
  const float eps = random.chance(0.5) ? 1e-5f : 0.5f;
  double squares = 0.0;
  for (const T value : input) squares += real(value) * real(value);
  const double factor = 1.0 / std::sqrt(squares / static_cast<double>(width) + static_cast<double>(eps));
  for (const cpu::Isa isa : instruction_sets()) {
    std::vector<T> output(width, number<T>(-7.0f));
    cpu::rms_norm(isa, input.data(), weight.data(), width, eps, output.data());
    for (int64_t i = 0; i < width; ++i) {
      const double exact = real(weight[i]) * real(input[i]) * factor;
      CHECK(std::abs(real(output[i]) - exact) <= rounding * std::abs(exact), seed, cpu::isa_name(isa), i);
    }
  }
}

}  // namespace
}  // namespace firp::test

int main() {
  for (uint64_t seed = 0; seed < 500; ++seed) {
    firp::test::one_case<float>(seed, 0x1p-20);
    firp::test::one_case<firp::cpu::bfloat16>(seed, 0x1p-7);
  }
}
