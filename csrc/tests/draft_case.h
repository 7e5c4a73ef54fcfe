// Random inputs of draft_tree, and its outputs on a CPU.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "firp/cpu/draft_tree.h"
#include "test.h"

namespace firp::test {

struct DraftCase {
  int64_t k, width, ranks, num_nodes, num_lookahead, root_token;
  int32_t num_offsets;
  std::vector<float> probabilities;
  std::vector<int64_t> candidates;
  std::vector<int32_t> order;

  cpu::Marginals marginals() const {
    return {probabilities.data(), candidates.data(), order.empty() ? nullptr : order.data(), width, ranks};
  }
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
      given.marginals(), given.root_token, given.num_offsets, given.num_nodes, given.num_lookahead,
      {out.tokens.data(), out.parents.data(), out.depths.data(), out.ancestors.data(), out.lookahead.data()});
  return out;
}

// Descending marginals, one a depth or one for each candidate of the depth above; some with ties, now and then one that no
// softmax gives.
inline DraftCase draft_case(uint64_t seed) {
  Random random(seed);
  DraftCase made{};
  made.k = random.between(1, 6);
  made.width = random.chance(0.1) ? random.between(20, 40) : random.between(1, 12);
  const bool ordered = random.chance(0.5);
  made.ranks = ordered ? random.between(1, made.width) : made.width;
  made.num_nodes = random.choice({1, 2, 5, 9, 31, 32, 33, 64, 70, 256});
  made.num_lookahead = random.between(1, made.num_nodes);
  made.num_offsets = static_cast<int32_t>(random.between(0, made.k));
  made.root_token = random.below(1000);
  const bool ties = random.chance(0.5);
  for (int64_t i = 0; i < made.k * made.width; ++i) made.candidates.push_back(random.below(1000));
  std::vector<int32_t> places(made.width);
  std::iota(places.begin(), places.end(), 0);
  for (int64_t row = 0; row < made.k * (ordered ? made.width : 1); ++row) {
    float left = 1.0f;
    for (int64_t i = made.width - 1; ordered && i > 0; --i) std::swap(places[i], places[random.below(i + 1)]);
    for (int64_t rank = 0; rank < made.ranks; ++rank) {
      float p = left * random.uniform();
      if (ties) p = std::round(p * 8) / 8;
      made.probabilities.push_back(p);
      if (ordered) made.order.push_back(places[rank]);
      left = std::min(p, 1.0f - p);
    }
  }
  if (random.chance(0.2)) {
    const float odd[] = {NAN, -0.5f, 0.0f, -0.0f, 1e-30f, 1e-45f};
    made.probabilities[random.below(made.probabilities.size())] = odd[random.below(6)];
  }
  return made;
}

}  // namespace firp::test
