// From a verified path to the tokens a step emits, on a CPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace firp::cpu {

// Dense arrays, named and shaped as in firp_kernels/ops/emit_tokens.py. `width` is max_depth + 1.
struct EmitTokens {
  const int32_t *path, *num_accepted;
  const int64_t* bonus;
  const int32_t *last_slot, *levels_up, *status;
  const int64_t *tokens, *stop_tokens;
  const int32_t* context_lens;
  const bool* finished;
  int64_t* remaining;
  int64_t *out_tokens, *counts;
  int32_t* kept;
  bool* out_finished;
  int64_t *root, *rows;
  int32_t* usable;
  int64_t* packed;
  int64_t width, num_nodes, num_stops, num_offsets, num_embeddings, max_context;
};

inline void emit_tokens(const EmitTokens& args, int64_t b) {
  const int64_t width = args.width, accepted = args.num_accepted[b];
  const bool broken = args.status[b] != 0;
  int64_t* emitted = args.out_tokens + b * width;
  int64_t count = args.finished[b] || broken ? 0 : std::min(accepted + 1, args.remaining[b]);
  bool stopped = false;
  for (int64_t i = 0; i < width; ++i) {
    if (i >= count) {
      emitted[i] = -1;
      continue;
    }
    const int64_t node = i == accepted ? 0 : std::max(args.path[b * width + i + 1], 0);
    emitted[i] = i == accepted ? args.bonus[b] : args.tokens[b * args.num_nodes + node];
    if (std::find(args.stop_tokens, args.stop_tokens + args.num_stops, emitted[i]) != args.stop_tokens + args.num_stops) {
      stopped = true;
      count = i + 1;
    }
  }
  args.remaining[b] -= count;
  args.counts[b] = count;
  args.kept[b] = static_cast<int32_t>(std::max<int64_t>(count - 1, 0));
  const bool full = args.context_lens[b] + args.kept[b] + 1 > args.max_context;
  args.out_finished[b] = args.finished[b] || stopped || args.remaining[b] == 0 || broken || full;
  int64_t* packed = args.packed + b * (width + 3);
  std::copy(emitted, emitted + width, packed);
  packed[width] = count;
  packed[width + 1] = args.out_finished[b];
  packed[width + 2] = args.status[b];

  const int64_t k = args.num_offsets, up = args.levels_up[b], slot = std::max(args.last_slot[b], 0);
  for (int64_t i = 0; i < k; ++i) args.rows[b * k + i] = slot * k + std::min(i + up, k - 1);
  args.usable[b] = static_cast<int32_t>(std::max<int64_t>(k - up, 0));
  args.root[b] = std::clamp<int64_t>(args.bonus[b], 0, args.num_embeddings - 1);
}

}  // namespace firp::cpu
