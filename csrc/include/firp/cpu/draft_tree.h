// Best-first draft tree of one sequence on a CPU. Products are rounded to float one by one, as everywhere.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace firp::cpu {

struct DraftTree {
  int64_t* tokens;
  int32_t* parents;
  int32_t* depths;
  int32_t* ancestors;
  int32_t* lookahead;
};

// The marginals of one sequence: candidates [k, width]. Without `order`, probabilities [k, ranks = width] are one row a
// depth, and ranks are candidates. With it, probabilities and order [k, width, ranks] have a row for every candidate of the
// depth above (the root takes row 0): the child of rank r holds candidate order[.., r].
struct Marginals {
  const float* probabilities;
  const int64_t* candidates;
  const int32_t* order;
  int64_t width, ranks;

  int64_t place(int64_t level, int64_t row, int64_t rank) const {
    return ((order ? level * width + row : level) * ranks) + rank;
  }
  // The candidate of a rank.
  int64_t candidate(int64_t level, int64_t row, int64_t rank) const { return order ? order[place(level, row, rank)] : rank; }
};

// `num_offsets` depths of the marginals are usable.
inline void draft_tree(
    const Marginals& marginals, int64_t root_token, int64_t num_offsets, int64_t num_nodes, int64_t num_lookahead,
    const DraftTree& out) {
  const int64_t words = (num_nodes + 31) / 32;
  const float nothing = -std::numeric_limits<float>::infinity();
  std::vector<float> reach(num_nodes, 0.0f), next_reach(num_nodes, 0.0f), mass(num_nodes, nothing);
  std::vector<int64_t> next_rank(num_nodes, 0), candidate(num_nodes, 0);
  const auto marginal = [&](int64_t level, int64_t row, int64_t rank) {
    const bool usable = level < num_offsets && rank < marginals.ranks;
    const float p = usable ? marginals.probabilities[marginals.place(level, row, rank)] : 0.0f;
    return p > 0.0f ? p : 0.0f;
  };
  for (int64_t node = 0; node < num_nodes; ++node) {
    out.tokens[node] = 0;
    out.parents[node] = -1;
    out.depths[node] = 0;
    for (int64_t w = 0; w < words; ++w) out.ancestors[node * words + w] = 0;
    out.ancestors[node * words + node / 32] = static_cast<int32_t>(1u << (node % 32));
  }
  out.tokens[0] = root_token;
  reach[0] = mass[0] = 1.0f;
  next_reach[0] = marginal(0, 0, 0);

  int64_t count = 1;
  for (; count < num_nodes; ++count) {
    int64_t parent = 0;
    for (int64_t node = 1; node < count; ++node) {
      if (next_reach[node] > next_reach[parent]) parent = node;
    }
    const float best = next_reach[parent];
    if (!(best > 0.0f)) break;
    const int64_t level = out.depths[parent], rank = next_rank[parent];
    candidate[count] = marginals.candidate(level, candidate[parent], rank);
    out.tokens[count] = marginals.candidates[level * marginals.width + candidate[count]];
    out.parents[count] = static_cast<int32_t>(parent);
    out.depths[count] = static_cast<int32_t>(level + 1);
    for (int64_t w = 0; w < words; ++w) out.ancestors[count * words + w] |= out.ancestors[parent * words + w];
    reach[count] = mass[count] = best;
    mass[parent] -= best;
    next_rank[parent] = rank + 1;
    next_reach[parent] = reach[parent] * marginal(level, candidate[parent], rank + 1);
    next_reach[count] = best * marginal(level + 1, candidate[count], 0);
  }

  for (int64_t slot = 0; slot < num_lookahead; ++slot) out.lookahead[slot] = -1;
  out.lookahead[0] = 0;
  for (int64_t slot = 1; slot < num_lookahead && slot < count; ++slot) {
    int64_t chosen = 1;
    for (int64_t node = 2; node < count; ++node) {
      if (mass[node] > mass[chosen]) chosen = node;
    }
    out.lookahead[slot] = static_cast<int32_t>(chosen);
    mass[chosen] = nothing;
  }
}

}  // namespace firp::cpu
