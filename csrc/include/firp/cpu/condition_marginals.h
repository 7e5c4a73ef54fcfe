// Top candidates of one sequence's depths, weighted by each token that may come before them. Sizes are small: 16 candidates
// of width 64.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "firp/cpu/number.h"

namespace firp::cpu {

// One row per token, `stride` elements apart.
template <typename T>
struct TokenTable {
  const T* data;
  int64_t stride;

  const T* row(int64_t token) const { return data + token * stride; }
};

// Sixteen sums side by side: the compiler may not reorder one sum, but turns these into vectors.
template <typename T>
float dot(const float* left, const T* right, int64_t width) {
  constexpr int64_t kSums = 16;
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= width; i += kSums) {
    for (int64_t lane = 0; lane < kSums; ++lane) sums[lane] += left[i + lane] * static_cast<float>(to_float(right[i + lane]));
  }
  for (; i < width; ++i) sums[i % kSums] += left[i] * static_cast<float>(to_float(right[i]));
  return std::accumulate(sums, sums + kSums, 0.0f);
}

// The marginal given [count], weighted by factors [count], to its `ranks` (at most count) most probable candidates, in
// descending order, the earlier first among equals. Weights that have no finite sum above 0 give probabilities 0.
inline void rank_weighted(
    const float* given, float* factors, int64_t count, int64_t ranks, float* probabilities, int32_t* order) {
  float highest = -std::numeric_limits<float>::infinity();
  for (int64_t c = 0; c < count; ++c) {
    if (given[c] > 0.0f) highest = std::max(highest, factors[c]);
  }
  // In double precision, where no quotient of two such sums overflows.
  double sum = 0.0, weight_sum = 0.0;
  for (int64_t c = 0; c < count; ++c) {
    factors[c] = given[c] > 0.0f ? given[c] * std::exp(factors[c] - highest) : 0.0f;
    sum += given[c];
    weight_sum += factors[c];
  }
  const double scale = sum / weight_sum;
  for (int64_t c = 0; c < count; ++c) {
    const float weight = std::isfinite(scale) ? static_cast<float>(factors[c] * scale) : 0.0f;
    int64_t place = std::min(c, ranks);
    for (; place > 0 && weight > probabilities[place - 1]; --place) {
      if (place == ranks) continue;
      probabilities[place] = probabilities[place - 1];
      order[place] = order[place - 1];
    }
    if (place == ranks) continue;
    probabilities[place] = weight;
    order[place] = static_cast<int32_t>(c);
  }
}

// probabilities, candidates [offsets, count] to probabilities and order [offsets, count, ranks]: row c of a depth follows
// candidate c of the depth above, every row of the first depth the root token.
template <typename T>
void condition_marginals(
    const float* probabilities, const int64_t* candidates, int64_t offsets, int64_t count, int64_t root_token,
    TokenTable<T> source, TokenTable<T> target, int64_t width, int64_t ranks, float* out_probabilities, int32_t* order) {
  std::vector<float> previous(width), factors(count);
  for (int64_t depth = 0; depth < offsets; ++depth) {
    const int64_t* tokens = candidates + depth * count;
    for (int64_t c = 0; c < count; ++c, out_probabilities += ranks, order += ranks) {
      if (depth == 0 && c > 0) {
        std::copy_n(out_probabilities - ranks, ranks, out_probabilities);
        std::copy_n(order - ranks, ranks, order);
        continue;
      }
      const T* row = source.row(depth == 0 ? root_token : tokens[c - count]);
      for (int64_t i = 0; i < width; ++i) previous[i] = static_cast<float>(to_float(row[i]));
      for (int64_t x = 0; x < count; ++x) factors[x] = dot(previous.data(), target.row(tokens[x]), width);
      rank_weighted(probabilities + depth * count, factors.data(), count, ranks, out_probabilities, order);
    }
  }
}

}  // namespace firp::cpu
