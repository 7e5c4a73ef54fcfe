// Best-first draft trees on a GPU, one warp per sequence: the integers of firp/cpu/draft_tree.h.
#pragma once

#include "firp/cuda/warp.cuh"

namespace firp::cuda {

constexpr int32_t kMaxNodes = 256;
// Marginals of one sequence that are kept in shared memory; more of them are read where they are.
constexpr int32_t kSharedMarginals = 2048;

// Dense arrays. candidates [B, k, width]; probabilities [B, k, ranks = width], or with `order` both [B, k, width, ranks];
// root_token, num_offsets [B]; tokens, parents, depths [B, N]; ancestors [B, N, ceil(N / 32)]; lookahead [B, P].
struct DraftTree {
  const float* probabilities;
  const int64_t* candidates;
  const int32_t* order;
  const int64_t* root_token;
  const int32_t* num_offsets;
  int64_t* tokens;
  int32_t* parents;
  int32_t* depths;
  int32_t* ancestors;
  int32_t* lookahead;
  int32_t k, width, ranks, num_nodes, num_lookahead;

  // Of one sequence, in `probabilities` and `order`.
  FIRP_DEVICE int64_t num_marginals() const { return static_cast<int64_t>(k) * (order ? width : 1) * ranks; }
  FIRP_DEVICE int64_t place(int32_t level, int32_t row, int32_t rank) const {
    return (order ? static_cast<int64_t>(level) * width + row : level) * ranks + rank;
  }
};

// A growing tree, in shared memory. `candidate` is the one a node holds among those of its depth, `next_rank` and
// `next_reach` are those of the child it would get next.
struct Growth {
  float reach[kMaxNodes], mass[kMaxNodes], next_reach[kMaxNodes];
  int32_t parent[kMaxNodes], depth[kMaxNodes], candidate[kMaxNodes], next_rank[kMaxNodes];
  float probabilities[kSharedMarginals];
  int32_t order[kSharedMarginals];
};

// One sequence's marginals: growing a node waits for one of them, which shared memory gives sooner.
struct Marginals {
  const float* probabilities;
  const int32_t* order;
};

// One lane's share. Several loads are under way at a time.
template <typename T>
FIRP_DEVICE void copy(const T* __restrict__ from, T* __restrict__ to, int32_t count, int32_t lane) {
#if defined(__CUDACC__)
#pragma unroll 8
#endif
  for (int32_t i = lane; i < count; i += kLanes) to[i] = from[i];
}

template <typename Warp>
FIRP_DEVICE Marginals stage(const DraftTree& args, int64_t sequence, Growth& tree, const Warp& warp) {
  const int64_t count = args.num_marginals();
  const float* probabilities = args.probabilities + sequence * count;
  const int32_t* order = args.order ? args.order + sequence * count : nullptr;
  if (count > kSharedMarginals) return {probabilities, order};
  warp.each([&](int32_t lane) {
    copy(probabilities, tree.probabilities, static_cast<int32_t>(count), lane);
    if (order) copy(order, tree.order, static_cast<int32_t>(count), lane);
  });
  return {tree.probabilities, order ? tree.order : nullptr};
}

// Number of nodes drafted, the root included.
template <typename Warp>
FIRP_DEVICE int32_t grow(const DraftTree& args, int64_t sequence, Growth& tree, const Warp& warp) {
  const int32_t usable = args.num_offsets[sequence];
  const Marginals marginals = stage(args, sequence, tree, warp);
  const auto marginal = [&](int32_t level, int32_t row, int32_t rank) {
    const bool there = level < usable && rank < args.ranks;
    const float p = there ? marginals.probabilities[args.place(level, row, rank)] : 0.0f;
    return p > 0.0f ? p : 0.0f;
  };
  const auto add = [&](int32_t node, int32_t parent, int32_t depth, int32_t candidate, float reach) {
    tree.parent[node] = parent;
    tree.depth[node] = depth;
    tree.candidate[node] = candidate;
    tree.reach[node] = tree.mass[node] = reach;
    tree.next_rank[node] = 0;
    tree.next_reach[node] = multiply(reach, marginal(depth, candidate, 0));
  };
  warp.each([&](int32_t lane) {
    if (lane == 0) add(0, -1, 0, 0, 1.0f);
  });

  int32_t count = 1;
  for (; count < args.num_nodes; ++count) {
    const int32_t parent = warp.largest([&](int32_t lane) {
                                 Candidate best{0, 0};
                                 for (int32_t node = lane; node < count; node += kLanes) {
                                   const uint32_t key = order_key(tree.next_reach[node]);
                                   if (key > best.key) best = {key, node};
                                 }
                                 return best;
                               })
                               .index;
    const float reach = tree.next_reach[parent];
    if (!(reach > 0.0f)) break;
    const int32_t level = tree.depth[parent], row = tree.candidate[parent], rank = tree.next_rank[parent];
    warp.each([&](int32_t lane) {
      if (lane == 0) {
        tree.mass[parent] = subtract(tree.mass[parent], reach);
        tree.next_rank[parent] = rank + 1;
        tree.next_reach[parent] = multiply(tree.reach[parent], marginal(level, row, rank + 1));
      } else if (lane == 1) {
        const int32_t next = marginals.order ? marginals.order[args.place(level, row, rank)] : rank;
        add(count, parent, level + 1, next, reach);
      }
    });
  }
  return count;
}

// The node's place among the lookahead slots: after the root and every node of more mass, ties to the lower index.
FIRP_DEVICE int32_t lookahead_slot(const Growth& tree, int32_t node, int32_t count) {
  const uint32_t own = order_key(tree.mass[node]);
  int32_t slot = 1;
  for (int32_t other = 1; other < count; ++other) {
    const uint32_t key = order_key(tree.mass[other]);
    slot += key > own || (key == own && other < node);
  }
  return slot;
}

template <typename Warp>
FIRP_DEVICE void draft_tree(const DraftTree& args, int64_t sequence, Growth& tree, const Warp& warp) {
  const int32_t count = grow(args, sequence, tree, warp);
  const int32_t num_nodes = args.num_nodes, words = (num_nodes + 31) / 32;
  const int64_t* candidates = args.candidates + sequence * args.k * args.width;
  const int64_t first = sequence * num_nodes;
  int32_t* lookahead = args.lookahead + sequence * args.num_lookahead;
  warp.each([&](int32_t lane) {
    for (int32_t node = lane; node < num_nodes; node += kLanes) {
      const bool drafted = node > 0 && node < count;
      const int64_t token = drafted ? candidates[(tree.depth[node] - 1) * args.width + tree.candidate[node]] : 0;
      args.tokens[first + node] = node == 0 ? args.root_token[sequence] : token;
      args.parents[first + node] = drafted ? tree.parent[node] : -1;
      args.depths[first + node] = drafted ? tree.depth[node] : 0;
    }
    for (int32_t entry = lane; entry < num_nodes * words; entry += kLanes) {
      const int32_t node = entry / words, word = entry % words;
      uint32_t bits = 0;
      for (int32_t above = node; above >= 0; above = above < count ? tree.parent[above] : -1) {
        if (above / 32 == word) bits |= 1u << (above % 32);
      }
      args.ancestors[first * words + entry] = static_cast<int32_t>(bits);
    }
    for (int32_t slot = lane; slot < args.num_lookahead; slot += kLanes) {
      if (slot == 0 || slot >= count) lookahead[slot] = slot == 0 ? 0 : -1;
    }
    for (int32_t node = lane + 1; node < count; node += kLanes) {
      const int32_t slot = lookahead_slot(tree, node, count);
      if (slot < args.num_lookahead) lookahead[slot] = node;
    }
  });
}

#if defined(__CUDACC__)
static __global__ void __launch_bounds__(kLanes) draft_tree_kernel(const DraftTree args) {
  __shared__ Growth tree;
  draft_tree(args, blockIdx.x, tree, Warp{});
}

inline cudaError_t draft_tree(const DraftTree& args, int64_t batch, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  draft_tree_kernel<<<static_cast<uint32_t>(batch), kLanes, 0, stream>>>(args);
  return cudaGetLastError();
}
#endif

}  // namespace firp::cuda
