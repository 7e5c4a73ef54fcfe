// The walk of verification on a CPU: one sequence, its choices by argmax or by inverse CDF.
#pragma once

#include <cstdint>

#include "firp/cpu/number.h"

namespace firp::cpu {

// Integers of one sequence. path holds max_depth + 1 entries.
struct Verified {
  int32_t* path;
  int32_t num_accepted = 0;
  int64_t bonus = 0;
  int32_t last_slot = 0, levels_up = 0, status = 0;
};

constexpr int64_t kBroken = -1;

// The first of the largest scores; kBroken if one is NaN.
template <typename T>
int64_t argmax(const T* scores, int64_t vocab) {
  constexpr int64_t kLanes = 16;
  using Wide = decltype(to_float(T{}));
  Wide best = to_float(scores[0]);
  Wide lanes[kLanes];
  bool nan[kLanes] = {};
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = best;
  int64_t v = 0;
  for (; v + kLanes <= vocab; v += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const Wide score = to_float(scores[v + i]);
      lanes[i] = score > lanes[i] ? score : lanes[i];
      nan[i] |= score != score;
    }
  }
  bool broken = false;
  for (int64_t i = 0; i < kLanes; ++i) {
    best = lanes[i] > best ? lanes[i] : best;
    broken |= nan[i];
  }
  for (; v < vocab; ++v) {
    const Wide score = to_float(scores[v]);
    best = score > best ? score : best;
    broken |= score != score;
  }
  if (broken || best != best) return kBroken;
  for (v = 0; to_float(scores[v]) != best; ++v) {
  }
  return v;
}

// The first token whose cumulative probability exceeds uniform * sum, never one of probability 0; kBroken on NaN.
template <typename T>
int64_t draw(const T* probabilities, int64_t vocab, float uniform) {
  double total = 0.0;
  int64_t last_positive = vocab - 1;
  bool any = false, broken = false;
  for (int64_t v = 0; v < vocab; ++v) {
    const double p = static_cast<double>(to_float(probabilities[v]));
    total += p;
    broken |= p != p;
    if (p > 0) last_positive = v, any = true;
  }
  if (broken) return kBroken;
  if (!any) return vocab - 1;
  const double threshold = static_cast<double>(uniform) * total;
  double cumulative = 0.0;
  for (int64_t v = 0; v < last_positive; ++v) {
    cumulative += static_cast<double>(to_float(probabilities[v]));
    if (cumulative > threshold) return v;
  }
  return last_positive;
}

// scores [N, V]; uniforms [max_depth + 1] or null (argmax); tokens, parents [N]; lookahead [P].
template <typename T>
void verify_tree(
    const T* scores, const float* uniforms, const int64_t* tokens, const int32_t* parents, const int32_t* lookahead,
    int64_t num_nodes, int64_t vocab, int64_t num_lookahead, int64_t max_depth, Verified& out) {
  for (int64_t i = 0; i <= max_depth; ++i) out.path[i] = -1;
  out.path[0] = 0;
  out.num_accepted = out.status = 0;
  int32_t node = 0;
  for (int64_t level = 0;; ++level) {
    const T* row = scores + node * vocab;
    const int64_t choice = uniforms ? draw(row, vocab, uniforms[level]) : argmax(row, vocab);
    out.bonus = choice;
    if (choice == kBroken) {
      out.status = 1;
      break;
    }
    if (level == max_depth) break;
    int32_t child = node + 1;
    while (child < num_nodes && !(parents[child] == node && tokens[child] == choice)) ++child;
    if (child >= num_nodes) break;
    node = child;
    out.path[level + 1] = node;
    ++out.num_accepted;
  }
  out.last_slot = -1;
  out.levels_up = 0;
  if (num_lookahead == 0) return;
  for (int32_t ancestor = node; out.levels_up <= max_depth; ++out.levels_up) {
    for (int32_t slot = 0; slot < num_lookahead; ++slot) {
      if (lookahead[slot] == ancestor) {
        out.last_slot = slot;
        return;
      }
    }
    ancestor = parents[ancestor] < 0 ? 0 : parents[ancestor];
  }
}

}  // namespace firp::cpu
