// The warp of firp/cuda/warp.cuh on the host: lanes run one after another, in an order that must not matter.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>

#include "draft_case.h"
#include "firp/cuda/draft_tree.cuh"
#include "test.h"

namespace firp::test {

class HostWarp {
 public:
  // Lanes in ascending order for seed 0, in a random one otherwise.
  explicit HostWarp(uint64_t seed) {
    for (int32_t lane = 0; lane < cuda::kLanes; ++lane) order_[lane] = lane;
    Random random(seed);
    for (int32_t i = cuda::kLanes - 1; seed && i > 0; --i) std::swap(order_[i], order_[random.below(i + 1)]);
  }

  template <typename Phase>
  void each(const Phase& phase) const {
    for (const int32_t lane : order_) phase(lane);
  }

  template <typename Phase>
  cuda::Candidate largest(const Phase& phase) const {
    cuda::Candidate best{0, INT32_MAX};
    for (const int32_t lane : order_) {
      const cuda::Candidate own = phase(lane);
      if (own.key > best.key || (own.key == best.key && own.index < best.index)) best = own;
    }
    return best;
  }

 private:
  std::array<int32_t, cuda::kLanes> order_;
};

// The CUDA algorithm with the lanes of the warp in the order of `seed`.
inline DraftResult run_warp(const DraftCase& given, uint64_t seed) {
  DraftResult out(given);
  const auto tree = std::make_unique<cuda::Growth>();
  const cuda::DraftTree args{
      .probabilities = given.probabilities.data(),
      .candidates = given.candidates.data(),
      .order = given.order.empty() ? nullptr : given.order.data(),
      .root_token = &given.root_token,
      .num_offsets = &given.num_offsets,
      .tokens = out.tokens.data(),
      .parents = out.parents.data(),
      .depths = out.depths.data(),
      .ancestors = out.ancestors.data(),
      .lookahead = out.lookahead.data(),
      .k = static_cast<int32_t>(given.k),
      .width = static_cast<int32_t>(given.width),
      .ranks = static_cast<int32_t>(given.ranks),
      .num_nodes = static_cast<int32_t>(given.num_nodes),
      .num_lookahead = static_cast<int32_t>(given.num_lookahead),
  };
  cuda::draft_tree(args, 0, *tree, HostWarp(seed));
  return out;
}

}  // namespace firp::test
