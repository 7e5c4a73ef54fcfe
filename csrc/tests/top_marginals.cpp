// top_marginals with every instruction set of this machine against a full sort in double precision.
#include "firp/cpu/top_marginals.h"

#include <limits>
#include <numeric>

#include "test.h"

namespace firp::test {
namespace {

template <typename T>
void one_case(uint64_t seed) {
  Random random(seed);
  const int64_t vocab = random.choice({1, 3, 16, 63, 64, 65, 130, 1000}),
                ranks = random.between(1, std::min<int64_t>(vocab, 20));
  std::vector<T> logits = normals<T>(random, vocab);
  if (random.chance(0.5)) {
    for (T& value : logits) value = number<T>(std::round(static_cast<float>(real(value))));
  }
  const bool broken = random.chance(0.2);
  if (broken) {
    const float infinite = std::numeric_limits<float>::infinity();
    logits[random.below(vocab)] = number<T>(random.chance(0.5) ? std::numeric_limits<float>::quiet_NaN() : infinite);
  }
  std::vector<int64_t> order(vocab);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return real(logits[a]) > real(logits[b]); });
  double total = 0.0;
  for (const T value : logits) total += std::exp(real(value) - real(logits[order[0]]));
  for (const cpu::Isa isa : instruction_sets()) {
    std::vector<float> probabilities(ranks, -7.0f);
    std::vector<int64_t> candidates(ranks, -7);
    cpu::top_marginals(isa, logits.data(), vocab, ranks, probabilities.data(), candidates.data());
    for (int64_t r = 0; r < ranks; ++r) {
      const double exact = broken ? 0.0 : std::exp(real(logits[order[r]]) - real(logits[order[0]])) / total;
      CHECK(candidates[r] == (broken ? r : order[r]), seed, cpu::isa_name(isa), r);
      CHECK(std::abs(probabilities[r] - exact) <= 0x1p-18 * exact, seed, cpu::isa_name(isa), r);
    }
  }
}

}  // namespace
}  // namespace firp::test

int main() {
  for (uint64_t seed = 0; seed < 1000; ++seed) {
    firp::test::one_case<float>(seed);
    firp::test::one_case<firp::cpu::bfloat16>(seed);
  }
}
