// Products of tree_attention_flow_kernel.h for CPUs that multiply bfloat16 pairs directly (AVX-512 BF16).
#include "firp/cpu/tree_attention_flow_kernel.h"

namespace firp::cpu::avx512_bf16 {

static inline __attribute__((always_inline)) __m512 multiply_add(__m512i pairs, __m512i other, __m512 sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)other);
}

// scores[i, :] = scale * query i . keys of one block.
template <int queries>
static void score(
    const uint32_t* query, const uint32_t* keys, int64_t padded, float scale, float* scores, int64_t scores_stride) {
  __m512 sums[queries][kTileVectors];
#pragma GCC unroll 6
  for (int i = 0; i < queries; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sums[i][v] = _mm512_setzero_ps();
  }
  for (int64_t p = 0; p < padded / 2; ++p, keys += kBlock) {
    __m512i key[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) key[v] = _mm512_loadu_si512(keys + v * kGroup);
#pragma GCC unroll 6
    for (int i = 0; i < queries; ++i) {
      const __m512i x = _mm512_set1_epi32(query[i * (padded / 2) + p]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[i][v] = multiply_add(key[v], x, sums[i][v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < queries; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v)
      _mm512_storeu_ps(scores + i * scores_stride + v * kGroup, _mm512_mul_ps(sums[i][v], _mm512_set1_ps(scale)));
  }
}

// sums[i, :] = sums[i, :] * factors[i] + weights of entries [first, last) of query i . their values.
template <int queries, int vectors>
static inline __attribute__((always_inline)) void add_columns(
    const uint32_t* weights, const uint32_t* values, int64_t stride, int64_t first, int64_t last, const float* factors,
    float* sums) {
  __m512 total[queries][vectors];
#pragma GCC unroll 6
  for (int i = 0; i < queries; ++i) {
    const __m512 factor = _mm512_set1_ps(factors[i]);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) total[i][v] = _mm512_mul_ps(_mm512_loadu_ps(sums + i * stride + v * kGroup), factor);
  }
  const auto step = [&](int64_t p, __m512i kept) __attribute__((always_inline)) {
    __m512i value[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) value[v] = _mm512_and_si512(_mm512_loadu_si512(values + p * stride + v * kGroup), kept);
#pragma GCC unroll 6
    for (int i = 0; i < queries; ++i) {
      const __m512i x = _mm512_set1_epi32(weights[i * (kBlock / 2) + p]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) total[i][v] = multiply_add(value[v], x, total[i][v]);
    }
  };
  int64_t p = first / 2;
  if (first % 2 && first < last) step(p++, _mm512_set1_epi32(0xffff0000));
  for (; 2 * p < last; ++p) step(p, _mm512_set1_epi32(-1));
#pragma GCC unroll 6
  for (int i = 0; i < queries; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) _mm512_storeu_ps(sums + i * stride + v * kGroup, total[i][v]);
  }
}

// `stride` columns, a multiple of 32, of values and sums alike.
template <int queries>
static void add(
    const uint32_t* weights, const uint32_t* values, int64_t stride, int64_t first, int64_t last, const float* factors,
    float* sums) {
  int64_t column = 0;
  for (; column + 64 <= stride; column += 64) {
    add_columns<queries, 4>(weights, values + column, stride, first, last, factors, sums + column);
  }
  if (column < stride) add_columns<queries, 2>(weights, values + column, stride, first, last, factors, sums + column);
}

// Calls f with the number of queries as a constant.
template <typename Function>
static inline __attribute__((always_inline)) void with_constant(int64_t queries, const Function& f) {
  if (queries == 6) f(std::integral_constant<int, 6>{});
  if (queries == 5) f(std::integral_constant<int, 5>{});
  if (queries == 4) f(std::integral_constant<int, 4>{});
  if (queries == 3) f(std::integral_constant<int, 3>{});
  if (queries == 2) f(std::integral_constant<int, 2>{});
  if (queries == 1) f(std::integral_constant<int, 1>{});
}

struct DotProducts {
  static constexpr int64_t kQueries = 6, kEntries = 2;

  static void score(
      int64_t queries, const uint32_t* query, const uint32_t* keys, int64_t padded, float scale, float* scores,
      int64_t scores_stride) {
    with_constant(queries, [&](auto some) __attribute__((always_inline)) {
      avx512_bf16::score<some>(query, keys, padded, scale, scores, scores_stride);
    });
  }

  static void add(
      int64_t queries, const uint32_t* weights, const uint32_t* values, int64_t padded, int64_t first, int64_t last,
      const float* factors, float* sums) {
    with_constant(queries, [&](auto some) __attribute__((always_inline)) {
      avx512_bf16::add<some>(weights, values, padded, first, last, factors, sums);
    });
  }
};

inline void tree_attention(
    const TreeAttention<bfloat16>& args, int64_t batch, int64_t kv_head, int64_t first_row, int64_t last_row) {
  attend<DotProducts>(args, batch, kv_head, first_row, last_row);
}

}  // namespace firp::cpu::avx512_bf16
