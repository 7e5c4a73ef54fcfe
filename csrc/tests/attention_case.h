// Random inputs of tree_attention and its brute force.
#pragma once

#include <algorithm>
#include <vector>

#include "firp/cpu/tree_attention.h"
#include "test.h"

namespace firp::test {

template <typename T>
struct AttentionCase {
  int64_t batch, capacity;
  std::vector<T> query, key, value, output;
  std::vector<int32_t> context_lens, parents, depths, ancestors, lookahead;
  cpu::TreeAttention<T> args;

  bool ancestor(int64_t b, int64_t node, int64_t above) const {
    for (; node >= 0; node = parents[b * args.num_nodes + node]) {
      if (node == above) return true;
    }
    return false;
  }
};

// Points args into the vectors, which are dense: query [B, R, H, D], caches [B, S, Hkv, D].
template <typename T>
void point(AttentionCase<T>& made) {
  cpu::TreeAttention<T>& args = made.args;
  const int64_t slot = args.kv_heads * args.head_dim, sequence = made.capacity * slot, row = args.heads * args.head_dim;
  made.output.assign(made.batch * args.rows * row, number<T>(-7.0f));
  args.query = made.query.data();
  args.query_batch = args.rows * row;
  args.query_row = row;
  args.query_head = args.head_dim;
  args.key = made.key.data();
  args.value = made.value.data();
  args.key_batch = args.value_batch = sequence;
  args.key_slot = args.value_slot = slot;
  args.key_head = args.value_head = args.head_dim;
  args.output = made.output.data();
  args.context_lens = made.context_lens.data();
  args.depths = made.depths.data();
  args.ancestors = made.ancestors.data();
  args.lookahead = made.lookahead.data();
}

// What lies after the step's rows is NaN.
template <typename T>
AttentionCase<T> attention_case(uint64_t seed) {
  Random random(seed);
  AttentionCase<T> made{};
  cpu::TreeAttention<T>& args = made.args;
  made.batch = random.between(1, 2);
  args.num_nodes = random.choice({1, 2, 5, 8, 33, 70});
  args.num_lookahead = random.between(0, std::min<int64_t>(args.num_nodes, 4));
  args.num_offsets = random.between(1, 3);
  args.rows = args.num_nodes + (random.chance(0.5) ? args.num_lookahead * args.num_offsets : 0);
  args.kv_heads = random.between(1, 2);
  args.heads = args.kv_heads * random.between(1, 4);
  args.head_dim = random.choice({1, 8, 20, 64, 80});
  args.window = random.choice({0, 0, 1, 3, 40, 100});
  args.scale = 1.0 / std::sqrt(static_cast<double>(args.head_dim));
  const int64_t words = (args.num_nodes + 31) / 32;
  made.depths.resize(made.batch * args.num_nodes);
  made.ancestors.resize(made.batch * args.num_nodes * words);
  for (int64_t b = 0; b < made.batch; ++b) {
    const int64_t real = random.between(1, args.num_nodes);
    made.context_lens.push_back(static_cast<int32_t>(random.choice({0, 1, 30, 63, 64, 65, 130})));
    for (int64_t node = 0; node < args.num_nodes; ++node) {
      const int64_t parent = node == 0 || node >= real ? -1 : random.below(node);
      made.parents.push_back(static_cast<int32_t>(parent));
      if (parent >= 0) made.depths[b * args.num_nodes + node] = made.depths[b * args.num_nodes + parent] + 1;
      for (int64_t above = 0; above < args.num_nodes; ++above) {
        const uint32_t bit = made.ancestor(b, node, above) ? 1u << (above % 32) : 0;
        made.ancestors[(b * args.num_nodes + node) * words + above / 32] |= static_cast<int32_t>(bit);
      }
    }
    for (int64_t slot = 0; slot < args.num_lookahead; ++slot) {
      made.lookahead.push_back(static_cast<int32_t>(random.between(-1, real - 1)));
    }
  }
  made.capacity = *std::max_element(made.context_lens.begin(), made.context_lens.end()) + args.rows + random.below(4);
  made.query = normals<T>(random, made.batch * args.rows * args.heads * args.head_dim);
  made.key = normals<T>(random, made.batch * made.capacity * args.kv_heads * args.head_dim);
  made.value = normals<T>(random, made.batch * made.capacity * args.kv_heads * args.head_dim);
  point(made);
  for (int64_t b = 0; b < made.batch; ++b) {
    for (int64_t i = (made.context_lens[b] + args.rows) * args.key_slot; i < args.key_batch; ++i) {
      made.key[b * args.key_batch + i] = made.value[b * args.key_batch + i] = number<T>(NAN);
    }
  }
  return made;
}

template <typename T>
void run(cpu::Isa isa, const AttentionCase<T>& made) {
  for (int64_t b = 0; b < made.batch; ++b) {
    for (int64_t head = 0; head < made.args.kv_heads; ++head) {
      const int64_t half = made.args.rows / 2;
      if (half) cpu::tree_attention(isa, made.args, b, head, 0, half);
      cpu::tree_attention(isa, made.args, b, head, half, made.args.rows);
    }
  }
}

// One element after another in double precision, from the parents instead of the bitmasks.
template <typename T>
std::vector<double> brute_force(const AttentionCase<T>& made) {
  const cpu::TreeAttention<T>& args = made.args;
  std::vector<double> out;
  for (int64_t b = 0; b < made.batch; ++b) {
    const int64_t context = made.context_lens[b];
    for (int64_t row = 0; row < args.rows; ++row) {
      const int64_t pseudo = row - args.num_nodes;
      const int64_t node = pseudo < 0 ? row : made.lookahead[b * args.num_lookahead + pseudo / args.num_offsets];
      const int64_t offset = pseudo < 0 ? 0 : pseudo % args.num_offsets + 1;
      const int64_t base = context + (node < 0 ? 0 : made.depths[b * args.num_nodes + node]), position = base + offset;
      std::vector<int64_t> slots;
      for (int64_t slot = 0; slot < context + args.rows; ++slot) {
        const int64_t step = slot - context, chain = step - (row - offset);
        int64_t at = slot;
        if (step >= 0 && step < args.num_nodes) {
          if (node < 0 || !made.ancestor(b, node, step)) continue;
          at = context + made.depths[b * args.num_nodes + step];
        } else if (step >= args.num_nodes) {
          if (offset == 0 || chain < 1 || chain > offset) continue;
          at = base + chain;
        }
        if (args.window == 0 || at > position - args.window) slots.push_back(slot);
      }
      for (int64_t head = 0; head < args.heads; ++head) {
        const int64_t shared = head / (args.heads / args.kv_heads) * args.head_dim + b * args.key_batch;
        const T* query = args.query + b * args.query_batch + row * args.query_row + head * args.query_head;
        std::vector<double> weights, sums(args.head_dim, 0.0);
        double total = 0.0;
        for (const int64_t slot : slots) {
          double score = 0.0;
          for (int64_t d = 0; d < args.head_dim; ++d)
            score += real(query[d]) * real(args.key[shared + slot * args.key_slot + d]);
          weights.push_back(std::exp(score * args.scale));
          total += weights.back();
          for (int64_t d = 0; d < args.head_dim; ++d)
            sums[d] += weights.back() * real(args.value[shared + slot * args.value_slot + d]);
        }
        for (const double sum : sums) out.push_back(sum / total);
      }
    }
  }
  return out;
}

}  // namespace firp::test
