// condition_marginals against brute force in double precision.
#include "firp/cpu/condition_marginals.h"

#include <limits>
#include <numeric>

#include "test.h"

namespace firp::test {
namespace {

constexpr float kInfinite = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

// What a depth becomes after the token `previous`: exact probabilities in the given order; zeros where it has no sum.
template <typename T>
std::vector<double> exact_depth(
    const float* given, const int64_t* tokens, int64_t count, const T* previous, const std::vector<T>& target, int64_t stride,
    int64_t width) {
  std::vector<double> factors(count, 0.0), weights(count, 0.0);
  double highest = -std::numeric_limits<double>::infinity(), sum = 0.0, weight_sum = 0.0;
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t i = 0; i < width; ++i) factors[c] += real(previous[i]) * real(target[tokens[c] * stride + i]);
    if (given[c] > 0.0f && factors[c] > highest) highest = factors[c];
  }
  for (int64_t c = 0; c < count; ++c) {
    if (given[c] > 0.0f) weights[c] = given[c] * std::exp(factors[c] - highest);
    sum += given[c];
    weight_sum += weights[c];
  }
  const bool usable = std::isfinite(weight_sum) && weight_sum > 0.0;
  for (double& weight : weights) weight = usable ? weight / weight_sum * sum : 0.0;
  return weights;
}

// Whole numbers in the tables make exact dots, and with few probabilities many ties.
template <typename T>
void one_case(uint64_t seed, double rounding) {
  Random random(seed);
  const int64_t vocab = random.choice({1, 5, 40}), width = random.choice({0, 1, 15, 16, 17, 64}),
                stride = width + random.below(3);
  const int64_t offsets = random.between(0, 3), count = random.choice({1, 2, 7, 16, 33}), ranks = random.between(1, count);
  const bool whole = random.chance(0.5);
  std::vector<T> source = normals<T>(random, vocab * stride), target = normals<T>(random, vocab * stride);
  for (std::vector<T>* table : {&source, &target}) {
    for (T& value : *table)
      value = number<T>(whole ? static_cast<float>(random.between(-1, 1)) : 0.3f * static_cast<float>(real(value)));
  }
  if (whole && width > 0 && random.chance(0.4)) {
    const int64_t broken = random.below(static_cast<int64_t>(target.size()));
    target[broken] = number<T>(random.chance(0.5) ? -kInfinite : random.chance(0.5) ? kInfinite : kNaN);
  }
  std::vector<float> given(offsets * count);
  std::vector<int64_t> tokens(offsets * count);
  const bool nothing = random.chance(0.1);
  for (float& p : given) p = nothing ? 0.0f : whole ? static_cast<float>(random.below(4)) / 8.0f : random.uniform();
  for (int64_t& token : tokens) token = random.below(vocab);
  const int64_t root = random.below(vocab);

  std::vector<float> probabilities(offsets * count * ranks, -7.0f);
  std::vector<int32_t> chosen(offsets * count * ranks, -7);
  cpu::condition_marginals<T>(
      given.data(), tokens.data(), offsets, count, root, {source.data(), stride}, {target.data(), stride}, width, ranks,
      probabilities.data(), chosen.data());

  for (int64_t row = 0; row < offsets * count; ++row) {
    const int64_t depth = row / count, previous = depth == 0 ? root : tokens[row - count];
    const int64_t* from = tokens.data() + depth * count;
    const std::vector<double> exact =
        exact_depth(given.data() + depth * count, from, count, source.data() + previous * stride, target, stride, width);
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return exact[a] > exact[b]; });
    for (int64_t r = 0; r < ranks; ++r) {
      const int64_t place = row * ranks + r;
      CHECK(chosen[place] == order[r], seed, row, r);
      CHECK(std::abs(probabilities[place] - exact[order[r]]) <= rounding * exact[order[r]] + 1e-37, seed, row, r);
    }
  }
}

// One candidate's factor, the other's being 0; both have probability 1/2.
void one_factor(float factor, float first, float second, int32_t best) {
  const std::vector<float> given = {0.5f, 0.5f}, source = {1.0f, 1.0f}, target = {0.0f, factor};
  const std::vector<int64_t> tokens = {0, 1};
  std::vector<float> probabilities(4);
  std::vector<int32_t> order(4);
  cpu::condition_marginals<float>(
      given.data(), tokens.data(), 1, 2, 0, {source.data(), 1}, {target.data(), 1}, 1, 2, probabilities.data(), order.data());
  CHECK((probabilities == std::vector<float>{first, second, first, second}), factor);
  CHECK((order == std::vector<int32_t>{best, 1 - best, best, 1 - best}), factor);
}

// A small probability whose factor outweighs all others takes everything.
void tiny_probability() {
  const std::vector<float> given = {0.75f, 1e-42f}, source = {1.0f, 1.0f}, target = {0.0f, 3000.0f};
  const std::vector<int64_t> tokens = {0, 1};
  std::vector<float> probabilities(2);
  std::vector<int32_t> order(2);
  cpu::condition_marginals<float>(
      given.data(), tokens.data(), 1, 2, 0, {source.data(), 1}, {target.data(), 1}, 1, 1, probabilities.data(), order.data());
  CHECK(order[0] == 1 && probabilities[0] == 0.75f, probabilities[0]);
}

}  // namespace
}  // namespace firp::test

int main() {
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    firp::test::one_case<float>(seed, 0x1p-18);
    firp::test::one_case<double>(seed, 0x1p-18);
    firp::test::one_case<firp::cpu::float16>(seed, 0x1p-18);
    firp::test::one_case<firp::cpu::bfloat16>(seed, 0x1p-18);
  }
  firp::test::one_factor(firp::test::kInfinite, 0.0f, 0.0f, 0);
  firp::test::one_factor(firp::test::kNaN, 0.0f, 0.0f, 0);
  firp::test::one_factor(-firp::test::kInfinite, 1.0f, 0.0f, 0);
  firp::test::one_factor(200.0f, 1.0f, 0.0f, 1);
  firp::test::one_factor(0.0f, 0.5f, 0.5f, 0);
  firp::test::tiny_probability();
}
