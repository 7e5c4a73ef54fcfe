// One instruction set's kernel of linear.h; included with FIRP_ISA and FIRP_VECTOR_BYTES defined.

namespace firp::cpu::FIRP_ISA {

// A step of the width, and how part `part` of its weights becomes a vector of floats: for bfloat16 the even elements,
// then the odd ones. The prepared input has the same order.
template <typename T>
struct Step;

template <>
struct Step<float> {
  static constexpr int64_t size = kLanes;
  static constexpr int parts = 1;
  static inline __attribute__((always_inline)) Floats load(const float* from, int) {
    return *reinterpret_cast<const LooseFloats*>(from);
  }
};

template <>
struct Step<bfloat16> {
  static constexpr int64_t size = 2 * kLanes;
  static constexpr int parts = 2;
  static inline __attribute__((always_inline)) Floats load(const bfloat16* from, int part) {
    const Words words = *reinterpret_cast<const LooseWords*>(from);
    return reinterpret_cast<Floats>(part == 0 ? words << 16 : words & 0xffff0000u);
  }
};

template <typename T>
void prepare(const Rows<T>& rows, int64_t first, int64_t last, float* prepared) {
  if (!rows.width) return;
  constexpr int64_t step = Step<T>::size;
  const int64_t stride = prepared_width(rows.width), whole = rows.width - rows.width % step;
  prepared += first * stride;
  for (int64_t r = first; r < last; ++r, prepared += stride) {
    const T* input = rows.data + r * rows.stride;
    T rest[step] = {};
    std::memcpy(rest, input + whole, (rows.width - whole) * sizeof(T));
    for (int64_t i = 0; i < stride; i += step) {
      for (int part = 0; part < Step<T>::parts; ++part) {
        const Floats values = i < whole ? Step<T>::load(input + i, part) : i == whole ? Step<T>::load(rest, part) : Floats{};
        *reinterpret_cast<LooseFloats*>(prepared + i + part * kLanes) = values;
      }
    }
  }
}

// The lanes are added in the order of `sum`, those of four vectors at once where a vector holds their quads.
static inline __attribute__((always_inline)) Quad sums_of_four(Floats a, Floats b, Floats c, Floats d) {
#if defined(__x86_64__) && FIRP_VECTOR_BYTES == 64
  const Floats ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const Floats cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  Floats quads = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  quads += _mm512_permute_ps(quads, 0x4e);
  quads += _mm512_permute_ps(quads, 0xb1);
  const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, quads));
#else
  const Quad p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const Quad pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const Quad rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
#endif
}

// More rows than these pass in blocks: those that stay in a cache (AVX-512: measured on a Xeon).
static int64_t most_at_once(int64_t width) { return FIRP_VECTOR_BYTES == 64 ? 127 : cached_rows(width); }

// Rows from which bfloat16 weights are widened once instead of with every tile (measured on a Xeon).
constexpr int64_t kWidenedRows = FIRP_VECTOR_BYTES == 64 ? 24 : 7;

// Rows of a tile, by the registers that its sums take; bfloat16 weights need some on their way to float (AVX2, measured).
template <typename T>
constexpr int64_t kTileRows = FIRP_VECTOR_BYTES == 64 ? 6
    : std::is_same_v<T, bfloat16>                     ? 2
                                                      : 3;

// Elements [from, to) of weight rows.
struct Part {
  int64_t from, to;
};

// `outs` outputs of `rows` rows, both known to the compiler so that sums stay in registers. Weight rows are
// weight_stride elements apart. Asks for what lies `soon` bytes after each of them, unless that is 0, or where it `shares`
// that with other tiles, after `part` of them. Where it `widens`, `widened` gets the weights as floats, `stride` apart, in
// the order of the prepared input.
template <bool widens, bool shares = false, typename T, int outs, int rows>
static inline __attribute__((always_inline)) void products(
    const float* input, int64_t stride, const T* weight, int64_t weight_stride, int64_t width, int64_t soon, float* widened,
    Floats (&sums)[outs][rows], Part part = {}) {
  for (int64_t i = 0; i < width; i += Step<T>::size) {
    const bool asks = shares ? i >= part.from && i < part.to : soon;
    if (asks && i * static_cast<int64_t>(sizeof(T)) % kLineBytes == 0) {
      for (int o = 0; o < outs; ++o) fetch_soon(reinterpret_cast<const char*>(weight + o * weight_stride + i) + soon);
    }
#pragma GCC unroll 8
    for (int part = 0; part < Step<T>::parts; ++part) {
      Floats x[rows];
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) x[r] = *reinterpret_cast<const LooseFloats*>(input + r * stride + i + part * kLanes);
#pragma GCC unroll 4
      for (int o = 0; o < outs; ++o) {
        const Floats loaded = Step<T>::load(weight + o * weight_stride + i, part);
        if constexpr (widens) save(loaded, widened + o * stride + i + part * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) sums[o][r] = fused(loaded, x[r], sums[o][r]);
      }
    }
  }
}

// Sums to outputs, `apart` elements from one output to the next and `output_stride` from one row to the next.
template <typename T, int outs, int rows>
static inline __attribute__((always_inline)) void finish(
    const Floats (&sums)[outs][rows], const T* bias, T* output, int64_t apart, int64_t output_stride) {
  static_assert(outs == 1 || outs == 4);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r, output += output_stride) {
    if constexpr (outs == 4) {
      Quad four = sums_of_four(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
      if (bias) four += Quad{to_float(bias[0]), to_float(bias[apart]), to_float(bias[2 * apart]), to_float(bias[3 * apart])};
      if (std::is_same_v<T, float> && apart == 1) {
        std::memcpy(output, &four, sizeof(four));
        continue;
      }
#pragma GCC unroll 4
      for (int o = 0; o < 4; ++o) store(four[o], output + o * apart);
    } else {
      store(sum(sums[0][r]) + (bias ? to_float(*bias) : 0.0f), output);
    }
  }
}

// The last, partial step of the weight is read from a copy padded with zeros. `widened`: of `products`.
template <typename T, int outs, int rows, bool widens = false, bool shares = false>
static void tile(
    const Linear<T>& args, int64_t first, int64_t apart, int64_t row, int64_t soon, float* widened, Part part = {}) {
  constexpr int64_t step = Step<T>::size;
  const int64_t stride = prepared_width(args.width), whole = args.width - args.width % step;
  const int64_t weight_stride = apart * args.weight_stride;
  const float* input = args.prepared + row * stride;
  const T* weight = args.weight + first * args.weight_stride;
  Floats sums[outs][rows] = {};
  products<widens, shares>(input, stride, weight, weight_stride, whole, soon, widened, sums, part);
  if (whole < args.width) {
    T rest[outs][step] = {};
    for (int o = 0; o < outs; ++o) {
      std::memcpy(rest[o], weight + o * weight_stride + whole, (args.width - whole) * sizeof(T));
    }
    products<widens>(input + whole, stride, rest[0], step, step, 0, widens ? widened + whole : nullptr, sums);
  }
  T* output = args.output + row * args.output_stride + first;
  finish(sums, args.bias ? args.bias + first : nullptr, output, apart, args.output_stride);
}

// As all_rows, for three tiles or more: each asks for its share of the weight rows that follow.
template <typename T, int outs>
static void all_rows_sharing(const Linear<T>& args, int64_t first, int64_t apart) {
  const int64_t soon = args.weight_stride * static_cast<int64_t>(sizeof(T));
  for (int64_t row = 0; row < args.rows;) {
    const int64_t take = tile_rows(args.rows - row, kTileRows<T>);
    const Part part{args.width * row / args.rows, args.width * (row + take) / args.rows};
    if (take == 3) tile<T, outs, 3, false, true>(args, first, apart, row, soon, nullptr, part);
    if (take == 2) tile<T, outs, 2, false, true>(args, first, apart, row, soon, nullptr, part);
    row += take;
  }
}

// All rows of `outs` outputs, each `apart` outputs from the one before: the first tile reads the weight rows from memory,
// the others find them in cache. The last of several asks for the rows that follow, where there are `more`, so that
// memory does not idle meanwhile; in float32 with AVX2 all of them do, from three on (measured on a Xeon).
template <typename T, int outs>
static void all_rows(const Linear<T>& args, int64_t first, int64_t apart, bool more) {
  if constexpr (FIRP_VECTOR_BYTES == 32 && std::is_same_v<T, float>) {
    if (more && args.rows > 2 * kTileRows<T>) return all_rows_sharing<T, outs>(args, first, apart);
  }
  for (int64_t row = 0; row < args.rows;) {
    const int64_t take = tile_rows(args.rows - row, kTileRows<T>);
    const bool asks = more && row > 0 && row + take == args.rows;
    const int64_t soon = asks ? args.weight_stride * static_cast<int64_t>(sizeof(T)) : 0;
    if constexpr (kTileRows<T> == 6) {
      if (take == 6) tile<T, outs, 6>(args, first, apart, row, soon, nullptr);
      if (take == 5) tile<T, outs, 5>(args, first, apart, row, soon, nullptr);
      if (take == 4) tile<T, outs, 4>(args, first, apart, row, soon, nullptr);
    }
    if constexpr (kTileRows<T> >= 3) {
      if (take == 3) tile<T, outs, 3>(args, first, apart, row, soon, nullptr);
    }
    if (take == 2) tile<T, outs, 2>(args, first, apart, row, soon, nullptr);
    if (take == 1) tile<T, outs, 1>(args, first, apart, row, soon, nullptr);
    row += take;
  }
}

// `width`: of whole steps of bfloat16, so that a row's last zeros are those of `tile`. Asks for `part` of the next weight
// rows.
template <int outs, int rows>
static void from_floats(
    const Linear<bfloat16>& args, const float* weight, int64_t first, int64_t apart, int64_t row, Part part) {
  constexpr int64_t step = Step<bfloat16>::size;
  const int64_t stride = prepared_width(args.width), width = (args.width + step - 1) / step * step;
  Floats sums[outs][rows] = {};
  products<false>(args.prepared + row * stride, stride, weight, stride, width, 0, nullptr, sums);
  const bfloat16* next = args.weight + (first + 1) * args.weight_stride;
  for (int64_t i = part.from; i < part.to; i += kLineBytes / 2) {
    for (int o = 0; o < outs; ++o) fetch_soon(reinterpret_cast<const char*>(next + o * apart * args.weight_stride + i));
  }
  bfloat16* output = args.output + row * args.output_stride + first;
  finish(sums, args.bias ? args.bias + first : nullptr, output, apart, args.output_stride);
}

// As all_rows, but the first tile writes its weights to `scratch` as floats, for the others. Those are of full size; it
// takes the rows that are left.
template <int outs>
static void all_rows_widened(const Linear<bfloat16>& args, float* scratch, int64_t first, int64_t apart, bool more) {
  constexpr int64_t most = kTileRows<float>;
  const int64_t widening = (args.rows - 1) % most + 1;
  if constexpr (most == 6) {
    if (widening == 6) tile<bfloat16, outs, 6, true>(args, first, apart, 0, 0, scratch);
    if (widening == 5) tile<bfloat16, outs, 5, true>(args, first, apart, 0, 0, scratch);
    if (widening == 4) tile<bfloat16, outs, 4, true>(args, first, apart, 0, 0, scratch);
  }
  if (widening == 3) tile<bfloat16, outs, 3, true>(args, first, apart, 0, 0, scratch);
  if (widening == 2) tile<bfloat16, outs, 2, true>(args, first, apart, 0, 0, scratch);
  if (widening == 1) tile<bfloat16, outs, 1, true>(args, first, apart, 0, 0, scratch);
  constexpr int64_t line = kLineBytes / 2;
  const auto share = [&](int64_t row) {
    return row == args.rows ? args.width : args.width * (row - widening) / (args.rows - widening) / line * line;
  };
  for (int64_t row = widening; row < args.rows; row += most) {
    from_floats<outs, most>(args, scratch, first, apart, row, {share(row), more ? share(row + most) : 0});
  }
}

template <typename T, int outs>
static void outputs(const Linear<T>& args, float* scratch, int64_t first, int64_t apart, bool more, bool widens) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (widens) return all_rows_widened<outs>(args, scratch, first, apart, more);
  }
  all_rows<T, outs>(args, first, apart, more);
}

// Rows, and outputs that all pass over them, before the next rows: what they read of either stays in a cache.
struct Block {
  int64_t rows, outputs;
};

// In float32 rows stay in the first-level cache, 28 KiB, and weights in the second, 512 KiB (a Xeon, measured).
template <typename T>
Block cached_block(int64_t width, int64_t outputs) {
  if (std::is_same_v<T, bfloat16>) return {cached_rows(width), outputs};
  const int64_t bytes = std::max<int64_t>(4 * prepared_width(width), 1), tile = kTileRows<T>;
  return {std::max((28 << 10) / bytes / tile * tile, tile), std::max<int64_t>((512 << 10) / bytes / 4 * 4, 4)};
}

template <typename T>
void blocks_of_rows(const Linear<T>& args, int64_t most, float* scratch, int64_t first, int64_t last, bool widens) {
  Linear<T> part = args;
  for (int64_t left = args.rows; left; left -= part.rows) {
    part.rows = tile_rows(left, most);
    int64_t i = first;
    for (; i + 4 <= last; i += 4) outputs<T, 4>(part, scratch, i, 1, false, widens);
    for (; i < last; ++i) outputs<T, 1>(part, scratch, i, 1, false, widens);
    part.prepared += part.rows * prepared_width(args.width);
    part.output += part.rows * args.output_stride;
  }
}

// For few rows the four outputs of a tile lie a quarter of the range apart: each of the four then reads one weight row
// after another, a long stream that the hardware's prefetcher follows by itself. `scratch`: scratch_size floats.
template <typename T>
void linear(const Linear<T>& args, float* scratch, int64_t first, int64_t last) {
  const bool widens = args.rows >= kWidenedRows;
  if (args.rows > most_at_once(args.width)) {
    const Block block = cached_block<T>(args.width, last - first);
    for (; first < last; first += block.outputs)
      blocks_of_rows(args, block.rows, scratch, first, std::min(first + block.outputs, last), widens);
    return;
  }
  const int64_t apart = (last - first) / 4;
  for (int64_t i = 0; i < apart; ++i, ++first) outputs<T, 4>(args, scratch, first, apart, i + 1 < apart, widens);
  for (first += 3 * apart; first < last; ++first) outputs<T, 1>(args, scratch, first, 1, false, widens);
}

}  // namespace firp::cpu::FIRP_ISA
