// Top candidates of one sequence's depths, weighted by the token before each. Sizes are small: 16 candidates of width 64.
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

// probabilities, candidates [offsets, count] to the `ranks` (at most count) most probable of each depth, in descending
// order, the earlier first among equals. A depth whose weights have no finite sum above 0 gets probabilities 0.
template <typename T>
void condition_marginals(
    const float* probabilities, const int64_t* candidates, int64_t offsets, int64_t count, int64_t root_token,
    TokenTable<T> source, TokenTable<T> target, int64_t width, int64_t ranks, float* out_probabilities,
    int64_t* out_candidates) {
  std::vector<float> before_token(width), weights(count);
  std::vector<int64_t> order(count);
  int64_t previous = root_token;
  for (int64_t depth = 0; depth < offsets; ++depth) {
    const float* given = probabilities + depth * count;
    const int64_t* tokens = candidates + depth * count;
    for (int64_t i = 0; i < width; ++i) before_token[i] = static_cast<float>(to_float(source.row(previous)[i]));
    float highest = -std::numeric_limits<float>::infinity();
    for (int64_t c = 0; c < count; ++c) {
      weights[c] = dot(before_token.data(), target.row(tokens[c]), width);
      if (given[c] > 0.0f) highest = std::max(highest, weights[c]);
    }
    // In double precision, where no quotient of two such sums overflows.
    double sum = 0.0, weight_sum = 0.0;
    for (int64_t c = 0; c < count; ++c) {
      weights[c] = given[c] > 0.0f ? given[c] * std::exp(weights[c] - highest) : 0.0f;
      sum += given[c];
      weight_sum += weights[c];
    }
    const double scale = sum / weight_sum;
    const bool usable = std::isfinite(scale);
    for (float& weight : weights) weight = usable ? static_cast<float>(weight * scale) : 0.0f;
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + ranks, order.end(), [&](int64_t a, int64_t b) {
      return weights[a] != weights[b] ? weights[a] > weights[b] : a < b;
    });
    for (int64_t rank = 0; rank < ranks; ++rank) {
      out_probabilities[depth * ranks + rank] = weights[order[rank]];
      out_candidates[depth * ranks + rank] = tokens[order[rank]];
    }
    previous = tokens[order[0]];
  }
}

}  // namespace firp::cpu
