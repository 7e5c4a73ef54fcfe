// The bfloat16 linear of linear.h for CPUs that multiply tiles of bfloat16 pairs (AMX): sixteen outputs by up to sixteen
// rows, 32 elements of the width at a time. Weights are read as they lie. Inputs are prepared in blocks of sixteen rows,
// the last one of those left: word [pair, row] of a block, as the tile of a second factor wants it.

namespace firp::cpu::amx {

constexpr int64_t kStep = 32;
// Two tiles of outputs by two of rows, and the four that they are made of, are all tiles there are.
constexpr int64_t kOutputs = 2 * kGroup;
constexpr int64_t kRows = 2 * kGroup;

inline int64_t block_rows(int64_t rows, int64_t first) { return std::min(kGroup, rows - first); }

static inline __attribute__((always_inline)) __mmask16 lanes(int64_t first, int64_t last) {
  return static_cast<__mmask16>(((1u << last) - 1) & ~((1u << first) - 1));
}

inline void prepare(const Rows<bfloat16>& rows, int64_t first, int64_t last, float* prepared) {
  const int64_t padded = prepared_width(rows.width);
  for (int64_t start = first / kGroup * kGroup; start < last; start += kGroup) {
    const int64_t count = block_rows(rows.count, start), low = std::max<int64_t>(first - start, 0);
    const int64_t high = std::min(last - start, count);
    uint32_t* to = reinterpret_cast<uint32_t*>(prepared) + start * padded / 2;
    for (int64_t i = 0; i < padded; i += kStep) {
      const __mmask32 mask = columns_mask(rows.width, i);
      __m512i pairs[kGroup];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kGroup; ++r) {
        const bool live = low <= r && r < high;
        pairs[r] = _mm512_maskz_loadu_epi16(live ? mask : 0, rows.data + (start + (live ? r : low)) * rows.stride + i);
      }
      transpose(pairs);
#pragma GCC unroll 16
      for (int64_t p = 0; p < kGroup; ++p) _mm512_mask_storeu_epi32(to + p * count, lanes(low, high), pairs[p]);
      to += kGroup * count;
    }
  }
}

// The tiles of `outputs` by `rows`, up to kOutputs and kRows: sums [output, row] in tiles 0 to 3, weights [output, pair]
// in 4 and 5, inputs [pair, row] in 6 and 7.
class Tiles {
 public:
  ~Tiles() { _tile_release(); }

  void shape(int64_t outputs, int64_t rows) {
    if (outputs == outputs_ && rows == rows_) return;
    outputs_ = outputs, rows_ = rows;
    TileShapes shapes;
    for (int i = 0; i < 2; ++i) {
      const int64_t some_outputs = std::clamp<int64_t>(outputs - i * kGroup, 1, kGroup);
      for (int j = 0; j < 2; ++j) {
        shapes.set(2 * i + j, some_outputs, std::clamp<int64_t>(rows - j * kGroup, 1, kGroup));
      }
      shapes.set(4 + i, some_outputs, kGroup);
      shapes.set(6 + i, kGroup, std::clamp<int64_t>(rows - i * kGroup, 1, kGroup));
    }
    _tile_loadconfig(&shapes);
  }

 private:
  int64_t outputs_ = 0, rows_ = 0;
};

// Where a step's tiles lie. Strides in bytes; the second tiles may be missing.
struct Operands {
  const bfloat16* weight[2];
  int64_t weight_stride;
  const char* input[2];
  int64_t input_stride[2];
};

template <bool two_outputs, bool two_rows>
static inline __attribute__((always_inline)) void step(const Operands& at) {
  _tile_loadd(6, at.input[0], at.input_stride[0]);
  if constexpr (two_rows) _tile_loadd(7, at.input[1], at.input_stride[1]);
  _tile_loadd(4, at.weight[0], at.weight_stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (two_rows) _tile_dpbf16ps(1, 4, 7);
  if constexpr (two_outputs) {
    _tile_loadd(5, at.weight[1], at.weight_stride);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (two_rows) _tile_dpbf16ps(3, 5, 7);
  }
}

// Sums [output, row] plus the bias to rows of outputs.
static void finish(
    const float* sums, const Linear<bfloat16>& args, int64_t output, int64_t outputs, int64_t row, int64_t rows) {
  const __mmask16 used = lanes(0, outputs);
  __m512 bias = _mm512_setzero_ps();
  if (args.bias) {
    const __m256i halves = _mm256_maskz_loadu_epi16(used, args.bias + output);
    bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  __m512i lines[kGroup];
#pragma GCC unroll 16
  for (int64_t o = 0; o < kGroup; ++o) lines[o] = _mm512_load_si512(sums + o * kGroup);
  transpose(lines);
#pragma GCC unroll 16
  for (int64_t r = 0; r < kGroup; ++r) {
    if (r >= rows) continue;
    const __m256i halves = (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(_mm512_castsi512_ps(lines[r]), bias));
    _mm256_mask_storeu_epi16(args.output + (row + r) * args.output_stride + output, used, halves);
  }
}

// Outputs from `output` on by rows from `row` on. Asks for `lines` cache lines a step from `soon` on.
template <bool two_outputs, bool two_rows>
static void tile(
    const Linear<bfloat16>& args, int64_t output, int64_t outputs, int64_t row, int64_t rows, const char* soon, int64_t lines) {
  const int64_t padded = prepared_width(args.width), whole = args.width / kStep * kStep;
  const bfloat16* weight = args.weight + output * args.weight_stride;
  const char* input = reinterpret_cast<const char*>(args.prepared) + row * padded * 2;
  Operands at{
      .weight = {weight, weight + kGroup * args.weight_stride},
      .weight_stride = args.weight_stride * 2,
      .input = {input, input + kGroup * padded * 2},
      .input_stride = {4 * std::min(rows, kGroup), 4 * (rows - kGroup)},
  };
  settle();
  _tile_zero(0);
  if constexpr (two_rows) _tile_zero(1);
  if constexpr (two_outputs) _tile_zero(2);
  if constexpr (two_outputs && two_rows) _tile_zero(3);
  for (int64_t i = 0; i < whole; i += kStep) {
    for (int64_t l = 0; l < lines; ++l, soon += kLineBytes) fetch_soon(soon);
    step<two_outputs, two_rows>(at);
    for (int n = 0; n < 2; ++n) {
      at.weight[n] += kStep;
      at.input[n] += kGroup * at.input_stride[n];
    }
  }
  if (whole < args.width) {
    alignas(64) bfloat16 rest[kOutputs][kStep] = {};
    for (int64_t o = 0; o < outputs; ++o) {
      std::memcpy(rest[o], weight + o * args.weight_stride + whole, (args.width - whole) * sizeof(bfloat16));
    }
    at.weight[0] = rest[0], at.weight[1] = rest[kGroup], at.weight_stride = sizeof(rest[0]);
    settle();
    step<two_outputs, two_rows>(at);
  }
  alignas(64) float sums[4][kGroup * kGroup];
  constexpr int64_t kStride = kGroup * sizeof(float);
  _tile_stored(0, sums[0], kStride);
  if constexpr (two_rows) _tile_stored(1, sums[1], kStride);
  if constexpr (two_outputs) _tile_stored(2, sums[2], kStride);
  if constexpr (two_outputs && two_rows) _tile_stored(3, sums[3], kStride);
  settle();
  for (int o = 0; o <= two_outputs; ++o) {
    for (int r = 0; r <= two_rows; ++r) {
      const int64_t some_outputs = std::min(kGroup, outputs - o * kGroup), some_rows = std::min(kGroup, rows - r * kGroup);
      finish(sums[2 * o + r], args, output + o * kGroup, some_outputs, row + r * kGroup, some_rows);
    }
  }
}

// With rows for two tiles, the weights of the outputs that follow are asked for meanwhile, line after line in the order of
// memory. None past `last`: the weights there are another thread's. With fewer rows the loads run ahead by themselves, and
// with more, weights that wait in the second-level cache gain less than asking costs (measured).
static void all_rows(const Linear<bfloat16>& args, Tiles& tiles, int64_t first, int64_t last) {
  const int64_t outputs = std::min(kOutputs, last - first), steps = std::max<int64_t>(args.width / kStep, 1);
  const bool asks = args.rows > kGroup && args.rows <= kRows;
  const int64_t next = asks ? std::min(kOutputs, last - first - outputs) : 0;
  const int64_t bytes = next * args.weight_stride * static_cast<int64_t>(sizeof(bfloat16));
  const int64_t lines = (bytes + steps * kLineBytes - 1) / (steps * kLineBytes);
  const char* soon = reinterpret_cast<const char*>(args.weight + (first + outputs) * args.weight_stride);
  for (int64_t row = 0; row < args.rows; row += kRows) {
    const int64_t rows = std::min(kRows, args.rows - row);
    tiles.shape(outputs, rows);
    if (outputs > kGroup && rows > kGroup) tile<true, true>(args, first, outputs, row, rows, soon, lines);
    if (outputs > kGroup && rows <= kGroup) tile<true, false>(args, first, outputs, row, rows, soon, lines);
    if (outputs <= kGroup && rows > kGroup) tile<false, true>(args, first, outputs, row, rows, soon, lines);
    if (outputs <= kGroup && rows <= kGroup) tile<false, false>(args, first, outputs, row, rows, soon, lines);
  }
}

// Rows pass in blocks of up to 1 MiB, half the second-level cache of every processor with tiles.
inline void linear(const Linear<bfloat16>& args, float*, int64_t first, int64_t last) {
  if (!args.rows) return;
  const int64_t padded = prepared_width(args.width);
  const int64_t most = std::max<int64_t>((1 << 19) / std::max<int64_t>(padded, 1) / kRows, 1) * kRows;
  Tiles tiles;
  Linear<bfloat16> part = args;
  for (int64_t row = 0; row < args.rows; row += part.rows) {
    part.rows = std::min(most, args.rows - row);
    part.prepared = args.prepared + row * padded / 2;
    part.output = args.output + row * args.output_stride;
    for (int64_t output = first; output < last; output += kOutputs) all_rows(part, tiles, output, last);
  }
}

}  // namespace firp::cpu::amx
