// The gate of gated_linear with every instruction set of this machine against double precision; its linears are those
// of linear.cpp.
#include "firp/cpu/row.h"
#include "test.h"

namespace firp::test {
namespace {

template <typename T>
void one_case(uint64_t seed, double rounding) {
  Random random(seed);
  const int64_t count = random.choice({1, 3, 4, 15, 16, 17, 64, 100});
  std::vector<T> given = normals<T>(random, count);
  const std::vector<T> up = normals<T>(random, count);
  for (T& value : given)
    value = number<T>(static_cast<float>(real(value)) * static_cast<float>(random.choice({1, 1, 10, 100})));
  given[random.below(count)] = number<T>(NAN);
  for (const cpu::Isa isa : instruction_sets()) {
    std::vector<T> all = given;
    cpu::gate(isa, all.data(), up.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      const double x = real(given[i]), exact = x / (1.0 + std::exp(-x)) * real(up[i]);
      // exp stops at -87 in float.
      const bool near = std::abs(real(all[i]) - exact) <= rounding * std::abs(exact) + 1e-34;
      CHECK(std::isnan(x) ? std::isnan(real(all[i])) : near, seed, cpu::isa_name(isa), i, exact);
    }
    // An element's bits do not depend on where it stands.
    for (int64_t first = 0; first < count; ++first) {
      T alone = given[first];
      cpu::gate(isa, &alone, &up[first], 1);
      CHECK(std::memcmp(&alone, &all[first], sizeof(T)) == 0, seed, cpu::isa_name(isa), first);
    }
  }
}

}  // namespace
}  // namespace firp::test

int main() {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    firp::test::one_case<float>(seed, 0x1p-20);
    firp::test::one_case<firp::cpu::bfloat16>(seed, 0x1p-7);
  }
}
