// Tree attention on a CPU. One task is a block of query rows of one key/value head of one sequence.
//
// A row's entries are the context slots, then the tail slots it sees, in order: for a node they are the positions of a
// plain chain, so its result has the bits that plain decoding would give it, for any tree. Softmax runs online over
// blocks of entries that start at multiples of kBlock.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "firp/cpu/isa.h"
#include "firp/cpu/number.h"
#include "firp/cpu/pairs.h"
#include "firp/cpu/vector.h"

namespace firp::cpu {

constexpr int64_t kBlock = 64;

// Strides in elements; the last dimension of every tensor is dense. window 0: none.
template <typename T>
struct TreeAttention {
  const T* query;
  int64_t query_batch, query_row, query_head;
  const T* key;
  const T* value;
  int64_t key_batch, key_slot, key_head, value_batch, value_slot, value_head;
  T* output;
  const int32_t* context_lens;
  const int32_t* depths;
  const int32_t* ancestors;
  const int32_t* lookahead;
  int64_t rows, num_nodes, num_lookahead, num_offsets, heads, kv_heads, head_dim, window;
  double scale;
};

// Entries of a row: the context's slots, then these rows of the step. It sees them from entry `first` on: what its window
// has passed keeps its place, as in a plain chain.
struct RowView {
  int64_t first;
  std::vector<int32_t> tail;
};

// How many of its first entries of the tail a row shares with the one before: those of a chain, all that one has.
inline int64_t shared_tail(const std::vector<RowView>& views, int64_t row) {
  if (row == 0) return 0;
  const std::vector<int32_t>&before = views[row - 1].tail, &own = views[row].tail;
  return std::mismatch(before.begin(), before.end(), own.begin(), own.end()).first - before.begin();
}

template <typename T>
RowView row_view(const TreeAttention<T>& args, int64_t batch, int64_t row) {
  const int32_t* depths = args.depths + batch * args.num_nodes;
  const int64_t words = (args.num_nodes + 31) / 32;
  int64_t node = row, offset = 0, chain = 0;
  if (row >= args.num_nodes) {
    const int64_t pseudo = row - args.num_nodes;
    node = args.lookahead[batch * args.num_lookahead + pseudo / args.num_offsets];
    offset = pseudo % args.num_offsets + 1;
    chain = row - offset + 1;
  }
  const int64_t depth = (node < 0 ? 0 : depths[node]) + offset;
  const int64_t context = args.context_lens[batch], position = context + depth;
  const int64_t oldest = args.window ? position - args.window + 1 : 0;
  RowView view{std::clamp<int64_t>(oldest, 0, context), {}};
  int64_t passed = 0;
  const auto add = [&](int64_t own, int64_t at) {
    view.tail.insert(at < oldest ? view.tail.begin() + passed++ : view.tail.end(), static_cast<int32_t>(own));
  };
  if (node >= 0) {
    const int32_t* mask = args.ancestors + (batch * args.num_nodes + node) * words;
    for (int64_t a = 0; a < args.num_nodes; ++a) {
      const bool visible = static_cast<uint32_t>(mask[a / 32]) >> (a % 32) & 1;
      if (visible) add(a, context + depths[a]);
    }
  }
  for (int64_t j = 1; j <= offset; ++j) add(chain + j - 1, position - offset + j);
  if (passed) view.first = context + passed;
  return view;
}

// Entry by entry in double precision, for the types that have no vector kernel.
template <typename T>
void tree_attention_plain(const TreeAttention<T>& args, int64_t batch, int64_t kv_head, int64_t first_row, int64_t last_row) {
  const int64_t group = args.heads / args.kv_heads, context = args.context_lens[batch];
  const T* keys = args.key + batch * args.key_batch + kv_head * args.key_head;
  const T* values = args.value + batch * args.value_batch + kv_head * args.value_head;
  std::vector<double> weights, sums(args.head_dim);
  for (int64_t row = first_row; row < last_row; ++row) {
    const RowView view = row_view(args, batch, row);
    const int64_t count = context + static_cast<int64_t>(view.tail.size()) - view.first;
    const auto slot = [&](int64_t seen) {
      const int64_t entry = view.first + seen;
      return entry < context ? entry : context + view.tail[entry - context];
    };
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const T* query = args.query + batch * args.query_batch + row * args.query_row + head * args.query_head;
      weights.assign(count, 0.0);
      std::fill(sums.begin(), sums.end(), 0.0);
      double peak = -std::numeric_limits<double>::infinity(), total = 0.0;
      for (int64_t e = 0; e < count; ++e) {
        for (int64_t d = 0; d < args.head_dim; ++d) {
          weights[e] +=
              static_cast<double>(to_float(query[d])) * static_cast<double>(to_float(keys[slot(e) * args.key_slot + d]));
        }
        weights[e] *= args.scale;
        peak = std::max(peak, weights[e]);
      }
      for (int64_t e = 0; e < count; ++e) {
        const double weight = std::exp(weights[e] - peak);
        total += weight;
        for (int64_t d = 0; d < args.head_dim; ++d) {
          sums[d] += weight * static_cast<double>(to_float(values[slot(e) * args.value_slot + d]));
        }
      }
      T* out = args.output + ((batch * args.rows + row) * args.heads + head) * args.head_dim;
      for (int64_t d = 0; d < args.head_dim; ++d) store(static_cast<decltype(to_float(T{}))>(sums[d] / total), out + d);
    }
  }
}

}  // namespace firp::cpu

#define FIRP_KERNEL "firp/cpu/tree_attention_kernel.h"
#define FIRP_DOT_KERNEL "firp/cpu/tree_attention_dot_kernel.h"
#define FIRP_TILE_KERNEL "firp/cpu/tree_attention_tile_kernel.h"
#include "firp/cpu/for_each_isa.h"

namespace firp::cpu {

// Rows [first_row, last_row) of all query heads that share `kv_head`.
template <typename T>
void tree_attention(
    Isa isa, const TreeAttention<T>& args, int64_t batch, int64_t kv_head, int64_t first_row, int64_t last_row) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, bfloat16>) {
    FIRP_DISPATCH_TILE(tree_attention(args, batch, kv_head, first_row, last_row));
  } else {
    tree_attention_plain(args, batch, kv_head, first_row, last_row);
  }
}

}  // namespace firp::cpu
