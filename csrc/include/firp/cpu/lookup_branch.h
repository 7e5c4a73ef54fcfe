// A branch of the next draft tree that repeats what followed an earlier occurrence, of one sequence on a CPU.
#pragma once

#include <cstdint>

namespace firp::cpu {

// A tree of `num_nodes` nodes with room for more; `words` mask words a node.
struct GrownTree {
  int64_t* tokens;
  int32_t* parents;
  int32_t* depths;
  int32_t* ancestors;
  int64_t num_nodes, words;

  int64_t child(int64_t node, int64_t token) const {
    for (int64_t i = 1; i < num_nodes; ++i) {
      if (parents[i] == node && tokens[i] == token) return i;
    }
    return -1;
  }
  // Makes padding of a node.
  void clear(int64_t node) {
    tokens[node] = 0;
    parents[node] = -1;
    depths[node] = 0;
    for (int64_t w = 0; w < words; ++w) ancestors[node * words + w] = 0;
    ancestors[node * words + node / 32] = static_cast<int32_t>(1u << (node % 32));
  }
  int64_t add(int64_t parent, int64_t token) {
    clear(num_nodes);
    tokens[num_nodes] = token;
    parents[num_nodes] = static_cast<int32_t>(parent);
    depths[num_nodes] = depths[parent] + 1;
    for (int64_t w = 0; w < words; ++w) ancestors[num_nodes * words + w] |= ancestors[parent * words + w];
    return num_nodes++;
  }
};

struct Match {
  int64_t end, length;
};

// The longest match of the tokens before and at `last`, of at most `most` tokens; among equals the latest.
inline Match longest_match(const int64_t* history, int64_t last, int64_t most) {
  Match best{0, 0};
  for (int64_t end = last - 1; end >= 0 && best.length < most; --end) {
    int64_t length = 0;
    while (length < most && length <= end && history[end - length] == history[last - length]) ++length;
    if (length > best.length) best = {end, length};
  }
  return best;
}

// `history` is the text up to the root, at `last`. A branch that adds any node takes the place of the last `num_replaced`.
inline void lookup_branch(
    const int64_t* history, int64_t last, int64_t num_branch, int64_t least_match, int64_t most_match, int64_t num_replaced,
    GrownTree& tree) {
  const Match match = num_branch ? longest_match(history, last, most_match) : Match{0, 0};
  if (match.length < least_match) return;
  const int64_t given = tree.num_nodes, kept = given - num_replaced;
  tree.num_nodes = kept;
  for (int64_t node = 0, depth = 0; depth < num_branch; ++depth) {
    const int64_t token = history[match.end + 1 + depth % (last - match.end)], held = tree.child(node, token);
    node = held >= 0 ? held : tree.add(node, token);
  }
  if (tree.num_nodes == kept) tree.num_nodes = given;
  for (int64_t node = tree.num_nodes; node < given; ++node) tree.clear(node);
}

}  // namespace firp::cpu
