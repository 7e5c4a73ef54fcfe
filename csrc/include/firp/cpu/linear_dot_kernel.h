// The bfloat16 linear of linear.h for CPUs that multiply bfloat16 pairs directly (AVX-512 BF16): no widening, half the
// instructions. Inputs are prepared as bfloat16 rows padded with zeros.

namespace firp::cpu::avx512_bf16 {

constexpr int64_t kStep = 32;
constexpr int64_t kTileRows = 6;

inline void prepare(const Rows<bfloat16>& rows, int64_t first, int64_t last, float* prepared) {
  if (!rows.width) return;
  const int64_t bytes = rows.width * 2, stride = prepared_width(rows.width) * 2;
  char* to = reinterpret_cast<char*>(prepared) + first * stride;
  for (int64_t r = first; r < last; ++r, to += stride) {
    std::memcpy(to, rows.data + r * rows.stride, bytes);
    std::memset(to + bytes, 0, stride - bytes);
  }
}

// Which weights to ask for while `outs` outputs from `first` on are computed: a block of the same size, some blocks
// ahead, line after line in the order of memory for any order of use, shared out among the tiles of the rows. None past
// `last`, where the thread's outputs end: the weights there are another thread's.
struct Fetch {
  static constexpr int64_t kBlocksAhead = 4;

  // A tile takes kStep elements of each weight row at a time.
  Fetch(const Linear<bfloat16>& args, int64_t first, int64_t last, int64_t outs) {
    const int64_t tiles = (args.rows + kTileRows - 1) / kTileRows, steps = (args.width + kStep - 1) / kStep;
    const int64_t block = outs * args.weight_stride * static_cast<int64_t>(sizeof(bfloat16));
    const int64_t asked = kLineBytes * std::max<int64_t>(1, steps * tiles);  // without rows nothing is asked for
    lines = first + kBlocksAhead * outs < last ? (block + asked - 1) / asked : 0;
    begin = reinterpret_cast<const char*>(args.weight + first * args.weight_stride) + kBlocksAhead * block;
    share = lines * steps * kLineBytes;
  }

  const char* start(int64_t tile) const { return begin + tile * share; }

  const char* begin;
  int64_t lines, share;
};

// Four sums of sixteen lanes each.
static inline __attribute__((always_inline)) __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(all), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// `soon` is what this tile asks for of the weights to come, `lines` cache lines a step.
template <int outs, int rows>
static void tile(const Linear<bfloat16>& args, int64_t first, int64_t row, const char* soon, int64_t lines) {
  const int64_t stride = prepared_width(args.width), whole = args.width / kStep * kStep;
  const bfloat16* input = reinterpret_cast<const bfloat16*>(args.prepared) + row * stride;
  const bfloat16* weight = args.weight + first * args.weight_stride;
  __m512 sums[4][rows];
#pragma GCC unroll 4
  for (int o = 0; o < 4; ++o) {
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) sums[o][r] = _mm512_setzero_ps();
  }
  const auto step = [&](int64_t i, __mmask32 mask) __attribute__((always_inline)) {
    __m512bh x[rows];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) x[r] = (__m512bh)_mm512_loadu_si512(input + r * stride + i);
    for (int64_t l = 0; l < lines; ++l, soon += kLineBytes) fetch_soon(soon);
#pragma GCC unroll 4
    for (int o = 0; o < outs; ++o) {
      const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(mask, weight + o * args.weight_stride + i);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) sums[o][r] = _mm512_dpbf16_ps(sums[o][r], w, x[r]);
    }
  };
  for (int64_t i = 0; i < whole; i += kStep) step(i, 0xffffffffu);
  if (whole < args.width) step(whole, columns_mask(args.width, whole));

  float bias[4] = {};
  for (int o = 0; args.bias && o < outs; ++o) bias[o] = to_float(args.bias[first + o]);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    const __m128 four = _mm_add_ps(sums_of_four(sums[0][r], sums[1][r], sums[2][r], sums[3][r]), _mm_loadu_ps(bias));
    const __m128i halves = (__m128i)_mm_cvtneps_pbh(four);
    std::memcpy(args.output + (row + r) * args.output_stride + first, &halves, outs * sizeof(bfloat16));
  }
}

template <int outs>
static void all_rows(const Linear<bfloat16>& args, int64_t first, int64_t last) {
  const Fetch fetch(args, first, last, outs);
  for (int64_t row = 0, index = 0; row < args.rows; ++index) {
    const int64_t take = tile_rows(args.rows - row, kTileRows), lines = fetch.lines;
    const char* soon = fetch.start(index);
    if (take == 6) tile<outs, 6>(args, first, row, soon, lines);
    if (take == 5) tile<outs, 5>(args, first, row, soon, lines);
    if (take == 4) tile<outs, 4>(args, first, row, soon, lines);
    if (take == 3) tile<outs, 3>(args, first, row, soon, lines);
    if (take == 2) tile<outs, 2>(args, first, row, soon, lines);
    if (take == 1) tile<outs, 1>(args, first, row, soon, lines);
    row += take;
  }
}

// No weight is widened, so there is nothing to keep in the scratch.
inline void linear(const Linear<bfloat16>& args, float*, int64_t first, int64_t last) {
  for (; first + 4 <= last; first += 4) all_rows<4>(args, first, last);
  for (; first < last; ++first) all_rows<1>(args, first, last);
}

}  // namespace firp::cpu::avx512_bf16
