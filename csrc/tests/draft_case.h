// Random inputs of draft_tree, and its outputs on a CPU.
#pragma once

#include <algorithm>
#include <vector>

#include "firp/cpu/draft_tree.h"
#include "test.h"

namespace firp::test {

struct DraftCase {
  int64_t k, ranks, num_nodes, num_lookahead, root_token;
  int32_t num_offsets;
  std::vector<float> probabilities;
  std::vector<int64_t> candidates;
};

struct DraftResult {
  std::vector<int64_t> tokens;
  std::vector<int32_t> parents, depths, ancestors, lookahead;

  explicit DraftResult(const DraftCase& given)
      : tokens(given.num_nodes, -7),
        parents(given.num_nodes, -7),
        depths(given.num_nodes, -7),
        ancestors(given.num_nodes * ((given.num_nodes + 31) / 32), -7),
        lookahead(given.num_lookahead, -7) {}
  bool operator==(const DraftResult&) const = default;
};

inline DraftResult run_cpu(const DraftCase& given) {
  DraftResult out(given);
  cpu::draft_tree(
      given.probabilities.data(), given.candidates.data(), given.ranks, given.root_token, given.num_offsets, given.num_nodes,
      given.num_lookahead,
      {out.tokens.data(), out.parents.data(), out.depths.data(), out.ancestors.data(), out.lookahead.data()});
  return out;
}

// Descending marginals; some with ties, now and then one that no softmax gives.
inline DraftCase draft_case(uint64_t seed) {
  Random random(seed);
  DraftCase made{};
  made.k = random.between(1, 6);
  made.ranks = random.between(1, 12);
  made.num_nodes = random.choice({1, 2, 5, 9, 31, 32, 33, 64, 70, 256});
  made.num_lookahead = random.between(1, made.num_nodes);
  made.num_offsets = static_cast<int32_t>(random.between(0, made.k));
  made.root_token = random.below(1000);
  const bool ties = random.chance(0.5);
  for (int64_t level = 0; level < made.k; ++level) {
    float left = 1.0f;
    for (int64_t rank = 0; rank < made.ranks; ++rank) {
      float p = left * random.uniform();
      if (ties) p = std::round(p * 8) / 8;
      made.probabilities.push_back(p);
      made.candidates.push_back(random.below(1000));
      left = std::min(p, 1.0f - p);
    }
  }
  if (random.chance(0.2)) {
    const float odd[] = {NAN, -0.5f, 0.0f, -0.0f, 1e-30f, 1e-45f};
    made.probabilities[random.below(made.k * made.ranks)] = odd[random.below(6)];
  }
  return made;
}

}  // namespace firp::test
