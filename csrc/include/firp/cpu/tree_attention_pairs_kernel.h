// Keys and values laid out for tree_attention_flow_kernel.h, two bfloat16 to a word; included before it, for its
// instruction set.

namespace firp::cpu::avx512_bf16 {

// Keys of up to kBlock slots: to[pair * kBlock + slot]; slots past `rows` become zero.
static void pair_keys(const bfloat16* from, int64_t stride, int64_t rows, int64_t head_dim, uint32_t* to) {
  for (int64_t slot = 0; slot < kBlock; slot += kGroup) {
    for (int64_t d = 0; d < head_dim; d += 32) {
      __m512i vectors[kGroup];
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i) {
        // Even an empty mask must point at memory in use: past a mapped page it costs a hundred times a load.
        const bool live = slot + i < rows;
        vectors[i] = _mm512_maskz_loadu_epi16(live ? columns_mask(head_dim, d) : 0, from + (live ? slot + i : 0) * stride + d);
      }
      transpose(vectors);
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i) _mm512_storeu_si512(to + (d / 2 + i) * kBlock + slot, vectors[i]);
    }
  }
}

// Values of two entries, pair by pair: to[column]. A null second entry counts as zeros.
static inline __attribute__((always_inline)) void pair_values(
    const bfloat16* even, const bfloat16* odd, int64_t head_dim, uint32_t* to) {
  for (int64_t d = 0; d < head_dim; d += 32) {
    const __mmask32 mask = columns_mask(head_dim, d);
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    const __m512i a = _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi16(mask, even + d));
    const __m512i b = odd ? _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi16(mask, odd + d)) : _mm512_setzero_si512();
    _mm512_storeu_si512(to + d, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(to + d + 16, _mm512_unpackhi_epi16(a, b));
  }
}

}  // namespace firp::cpu::avx512_bf16
