// What kernels that multiply pairs of bfloat16 share, and those that multiply tiles of pairs.
#pragma once

#include <cstdint>

#include "firp/cpu/isa.h"
#include "firp/cpu/vector.h"

#if defined(__x86_64__)
FIRP_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512bf16")
namespace firp::cpu::avx512_bf16 {

constexpr int64_t kGroup = 16;

// rows[j] becomes word j of every row.
static inline __attribute__((always_inline)) void transpose(__m512i (&rows)[kGroup]) {
  __m512i other[kGroup];
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; i += 2) {
    other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kGroup; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x88), b = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x88),
                  d = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xdd);
    other[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    other[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    other[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    other[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kGroup; ++i) rows[i] = other[i];
}

// Which of the 32 elements from `first` on a row of `width` has.
static inline __attribute__((always_inline)) __mmask32 columns_mask(int64_t width, int64_t first) {
  return width - first >= 32 ? 0xffffffffu : (1u << (width - first)) - 1;
}

}  // namespace firp::cpu::avx512_bf16

namespace firp::cpu::amx {

using avx512_bf16::columns_mask;
using avx512_bf16::kGroup;
using avx512_bf16::transpose;

// As the instruction that loads it wants it.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t some_rows, int64_t words) {
    rows[tile] = static_cast<uint8_t>(some_rows);
    row_bytes[tile] = static_cast<uint16_t>(4 * words);
  }
};

// Compilers do not know that a tile's load reads memory, and its store writes it.
static inline __attribute__((always_inline)) void settle() { asm volatile("" ::: "memory"); }

}  // namespace firp::cpu::amx
FIRP_TARGET_END
#endif
