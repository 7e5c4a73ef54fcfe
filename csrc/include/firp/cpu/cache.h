// Key and value cache on a CPU: writing a step's rows and keeping the accepted ones. Bytes only; strides in bytes.
#pragma once

#include <cstdint>
#include <cstring>

namespace firp::cpu {

// Rows [B, R, Hkv] of `head_bytes` each, to slots context_lens + r of a cache [B, S, Hkv].
struct WriteCache {
  const char* rows;
  int64_t rows_batch, rows_row, rows_head;
  char* cache;
  int64_t cache_batch, cache_slot, cache_head;
  const int32_t* context_lens;
  int64_t num_rows, heads, head_bytes;
};

inline void write_cache(const WriteCache& args, int64_t batch) {
  const char* from = args.rows + batch * args.rows_batch;
  char* to = args.cache + batch * args.cache_batch + args.context_lens[batch] * args.cache_slot;
  for (int64_t r = 0; r < args.num_rows; ++r) {
    for (int64_t h = 0; h < args.heads; ++h) {
      std::memcpy(
          to + r * args.cache_slot + h * args.cache_head, from + r * args.rows_row + h * args.rows_head, args.head_bytes);
    }
  }
}

// One layer's keys or values of one sequence: slot start + i takes what slot start + path[i] held, i ascending, which
// is safe because path[i] >= i.
inline void commit_cache(
    char* slots, int64_t slot_stride, int64_t slot_bytes, int64_t start, const int32_t* path, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (path[i] != i) std::memcpy(slots + (start + i) * slot_stride, slots + (start + path[i]) * slot_stride, slot_bytes);
  }
}

}  // namespace firp::cpu
