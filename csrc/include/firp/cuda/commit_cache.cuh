// Keeping the accepted path's keys and values on a GPU: every layer and sequence in one launch.
//
// A thread owns columns, each one word of a slot in one plane (a layer's keys or values), and moves them along the path.
// Slot start + i takes what slot start + path[i] held; path ascends and path[i] >= i, so a column may read a few entries
// ahead of its writes, and columns never meet.
#pragma once

#include "firp/cuda/warp.cuh"

namespace firp::cuda {

// Strides and sizes in bytes. cache [L, 2, B, S] slots of slot_bytes; path [B, path_length]; the rest [B].
struct CommitCache {
  char* cache;
  int64_t layer, plane, sequence, slot;
  int32_t* context_lens;
  const int32_t* path;
  const int32_t* num_accepted;
  const bool* finished;
  int32_t layers, slot_bytes, path_length;
};

// The blocks of a sequence read its length and one of them advances it, all in one launch: until the last has come,
// the bits above the length count those that came.
constexpr int32_t kLengthBits = 24, kMaxCapacity = 1 << kLengthBits, kMaxParts = 127;

struct Arrival {
  int32_t length, advance;
};

// What a block learns from the counter as it found it and added 1 << kLengthBits to it: the length, and, if it came last
// of `parts`, what turns the counter into the new length (else 0).
FIRP_DEVICE Arrival arrive(int32_t found, int32_t parts, int32_t rows) {
  const bool last = (found >> kLengthBits) == parts - 1;
  return {found & (kMaxCapacity - 1), last ? rows - (parts << kLengthBits) : 0};
}

// A slot's words of type Word along the path, in one column of the sequence; words_per_slot columns make a plane.
template <typename Word>
FIRP_DEVICE void move_column(
    const CommitCache& args, int64_t sequence, int32_t length, int32_t rows, int32_t words_per_slot, int32_t column) {
  constexpr int32_t kAhead = 4;
  const int32_t plane = column / words_per_slot;
  char* slots = args.cache + plane / 2 * args.layer + plane % 2 * args.plane + sequence * args.sequence + length * args.slot +
      column % words_per_slot * static_cast<int64_t>(sizeof(Word));
  const int32_t* path = args.path + sequence * args.path_length;
  for (int32_t row = 0; row < rows; row += kAhead) {
    Word held[kAhead] = {};
    for (int32_t i = 0; i < kAhead; ++i) {
      if (row + i < rows) held[i] = *reinterpret_cast<const Word*>(slots + path[row + i] * args.slot);
    }
    for (int32_t i = 0; i < kAhead; ++i) {
      if (row + i < rows) *reinterpret_cast<Word*>(slots + (row + i) * args.slot) = held[i];
    }
  }
}

// The widest word, up to 16 bytes, that the cache's alignment, strides and slots allow.
inline int64_t word_bytes(const CommitCache& args) {
  const uint64_t together = reinterpret_cast<uint64_t>(args.cache) | static_cast<uint64_t>(args.layer) |
      static_cast<uint64_t>(args.plane) | static_cast<uint64_t>(args.sequence) | static_cast<uint64_t>(args.slot) |
      static_cast<uint64_t>(args.slot_bytes) | 16u;
  return static_cast<int64_t>(together & (~together + 1));
}

#if defined(__CUDACC__)
constexpr int32_t kThreads = 256;

template <typename Word>
static __global__ void __launch_bounds__(kThreads) commit_cache_kernel(const CommitCache args, int32_t parts) {
  const int64_t sequence = blockIdx.y;
  if (args.finished[sequence]) return;
  const int32_t rows = args.num_accepted[sequence] + 1;
  __shared__ int32_t length;
  if (threadIdx.x == 0) {
    const Arrival arrival = arrive(atomicAdd(args.context_lens + sequence, 1 << kLengthBits), parts, rows);
    if (arrival.advance) atomicAdd(args.context_lens + sequence, arrival.advance);
    length = arrival.length;
  }
  __syncthreads();
  const int32_t words_per_slot = args.slot_bytes / static_cast<int32_t>(sizeof(Word));
  const int32_t columns = 2 * args.layers * words_per_slot, stride = parts * kThreads;
  for (int32_t column = blockIdx.x * kThreads + threadIdx.x; column < columns; column += stride) {
    move_column<Word>(args, sequence, length, rows, words_per_slot, column);
  }
}

template <typename Word>
cudaError_t commit_cache_words(const CommitCache& args, int64_t batch, cudaStream_t stream) {
  const int64_t columns = 2 * args.layers * (args.slot_bytes / static_cast<int64_t>(sizeof(Word)));
  const int64_t blocks = (columns + kThreads - 1) / kThreads;
  const int32_t parts = static_cast<int32_t>(blocks < 1 ? 1 : blocks > kMaxParts ? kMaxParts : blocks);
  commit_cache_kernel<Word><<<dim3(parts, static_cast<uint32_t>(batch)), kThreads, 0, stream>>>(args, parts);
  return cudaGetLastError();
}

inline cudaError_t commit_cache(const CommitCache& args, int64_t batch, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  switch (word_bytes(args)) {
    case 16: return commit_cache_words<uint4>(args, batch, stream);
    case 8: return commit_cache_words<uint64_t>(args, batch, stream);
    case 4: return commit_cache_words<uint32_t>(args, batch, stream);
    case 2: return commit_cache_words<uint16_t>(args, batch, stream);
    default: return commit_cache_words<uint8_t>(args, batch, stream);
  }
}
#endif

}  // namespace firp::cuda
