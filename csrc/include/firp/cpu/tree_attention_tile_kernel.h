// Products of tree_attention_flow_kernel.h for CPUs that multiply tiles of bfloat16 pairs (AMX): sixteen queries by
// sixteen slots or columns. Entries of the values are multiplied 32 at a time from the start of a block: those that do not
// count weigh nothing.

namespace firp::cpu::amx {

class TileProducts {
 public:
  static constexpr int64_t kQueries = kGroup, kEntries = 32;

  TileProducts() = default;
  TileProducts(const TileProducts&) = delete;
  TileProducts& operator=(const TileProducts&) = delete;
  ~TileProducts() { _tile_release(); }

  // scores[i, :] = scale * query i . keys of one block.
  void score(
      int64_t queries, const uint32_t* query, const uint32_t* keys, int64_t padded, float scale, float* scores,
      int64_t scores_stride) {
    shape(queries);
    settle();
    zero();
    for (int64_t d = 0; d < padded; d += kEntries) multiply(query + d / 2, padded * 2, keys + d / 2 * kBlock, kBlock);
    keep(scores, scores_stride);
    settle();
    for (int64_t i = 0; i < queries; ++i) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kBlock; v += kGroup) {
        float* at = scores + i * scores_stride + v;
        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(scale)));
      }
    }
  }

  // sums[i, :] = sums[i, :] * factors[i] + weights of entries [first, last) of query i . their values. Weights of the
  // others are zero. Values before `first` may be anything.
  void add(
      int64_t queries, const uint32_t* weights, const uint32_t* values, int64_t padded, int64_t first, int64_t last,
      const float* factors, float* sums) {
    shape(queries);
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t c = 0; c < padded; c += kGroup) {
        float* at = sums + i * padded + c;
        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(factors[i])));
      }
    }
    alignas(64) uint32_t seen[kGroup * kBlock];
    settle();
    for (int64_t c = 0; c < padded; c += kBlock) {
      const bool whole = c + kBlock <= padded;
      take(sums + c, padded, whole);
      for (int64_t e = first / kEntries * kEntries; e < last; e += kEntries) {
        const uint32_t* pairs = values + e / 2 * padded + c;
        int64_t stride = padded;
        if (e < first) {
          copy_seen(pairs, padded, first - e, whole ? kBlock : kBlock / 2, seen);
          pairs = seen, stride = kBlock;
          settle();
        }
        whole ? multiply(weights + e / 2, kBlock * 2, pairs, stride)
              : multiply_half(weights + e / 2, kBlock * 2, pairs, stride);
      }
      whole ? keep(sums + c, padded) : keep_half(sums + c, padded);
    }
    settle();
  }

 private:
  // Sums [query, slot or column] in tiles 0 to 3, queries or weights [query, pair] in 4, keys or values [pair, slot or
  // column] in 5.
  void shape(int64_t queries) {
    if (queries == queries_) return;
    queries_ = queries;
    TileShapes shapes;
    for (int tile = 0; tile < 6; ++tile) shapes.set(tile, tile < 5 ? queries : kGroup, kGroup);
    _tile_loadconfig(&shapes);
  }

  static inline __attribute__((always_inline)) void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  static inline __attribute__((always_inline)) void take(const float* sums, int64_t stride, bool whole) {
    _tile_loadd(0, sums, stride * 4);
    _tile_loadd(1, sums + kGroup, stride * 4);
    if (!whole) return;
    _tile_loadd(2, sums + 2 * kGroup, stride * 4);
    _tile_loadd(3, sums + 3 * kGroup, stride * 4);
  }

  static inline __attribute__((always_inline)) void keep_half(float* sums, int64_t stride) {
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + kGroup, stride * 4);
  }

  static inline __attribute__((always_inline)) void keep(float* sums, int64_t stride) {
    keep_half(sums, stride);
    _tile_stored(2, sums + 2 * kGroup, stride * 4);
    _tile_stored(3, sums + 3 * kGroup, stride * 4);
  }

  static inline __attribute__((always_inline)) void multiply_half(
      const uint32_t* first, int64_t first_bytes, const uint32_t* second, int64_t stride) {
    _tile_loadd(4, first, first_bytes);
    _tile_loadd(5, second, stride * 4);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, second + kGroup, stride * 4);
    _tile_dpbf16ps(1, 4, 5);
  }

  static inline __attribute__((always_inline)) void multiply(
      const uint32_t* first, int64_t first_bytes, const uint32_t* second, int64_t stride) {
    multiply_half(first, first_bytes, second, stride);
    _tile_loadd(5, second + 2 * kGroup, stride * 4);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(5, second + 3 * kGroup, stride * 4);
    _tile_dpbf16ps(3, 4, 5);
  }

  // Pairs of 32 entries, zeros for the first `unseen`.
  static void copy_seen(const uint32_t* pairs, int64_t stride, int64_t unseen, int64_t columns, uint32_t* to) {
    for (int64_t p = 0; p < kGroup; ++p) {
      const uint32_t kept = 2 * p >= unseen ? 0xffffffffu : 2 * p + 1 >= unseen ? 0xffff0000u : 0;
      for (int64_t c = 0; c < columns; ++c) to[p * kBlock + c] = pairs[p * stride + c] & kept;
    }
  }

  int64_t queries_ = 0;
};

inline void tree_attention(
    const TreeAttention<bfloat16>& args, int64_t batch, int64_t kv_head, int64_t first_row, int64_t last_row) {
  avx512_bf16::attend<TileProducts>(args, batch, kv_head, first_row, last_row);
}

}  // namespace firp::cpu::amx
