// rotary with every instruction set of this machine against double precision.
#include "firp/cpu/row.h"
#include "test.h"

namespace firp::test {
namespace {

template <typename T>
void one_case(uint64_t seed, double rounding) {
  Random random(seed);
  const int64_t width = 2 * random.choice({1, 3, 8, 16, 17, 32, 40, 64}), half = width / 2;
  const std::vector<T> given = normals<T>(random, width), cos = normals<T>(random, width), sin = normals<T>(random, width);
  for (const cpu::Isa isa : instruction_sets()) {
    std::vector<T> row = given;
    cpu::rotary(isa, row.data(), cos.data(), sin.data(), width);
    for (int64_t i = 0; i < width; ++i) {
      const double rotated = i < half ? -real(given[i + half]) : real(given[i - half]);
      const double own = real(given[i]) * real(cos[i]), other = rotated * real(sin[i]);
      CHECK(
          std::abs(real(row[i]) - (own + other)) <= rounding * (std::abs(own) + std::abs(other)), seed, cpu::isa_name(isa), i);
    }
  }
}

}  // namespace
}  // namespace firp::test

int main() {
  for (uint64_t seed = 0; seed < 500; ++seed) {
    firp::test::one_case<float>(seed, 0x1p-22);
    firp::test::one_case<firp::cpu::bfloat16>(seed, 0x1p-7);
  }
}
