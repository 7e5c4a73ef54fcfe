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
void prepare(const T* input, int64_t input_stride, int64_t rows, int64_t width, float* prepared) {
  constexpr int64_t step = Step<T>::size;
  const int64_t stride = prepared_width(width), whole = width - width % step;
  for (int64_t r = 0; r < rows; ++r, input += input_stride, prepared += stride) {
    T rest[step] = {};
    std::memcpy(rest, input + whole, (width - whole) * sizeof(T));
    for (int64_t i = 0; i < stride; i += step) {
      for (int part = 0; part < Step<T>::parts; ++part) {
        const Floats values = i < whole ? Step<T>::load(input + i, part) : i == whole ? Step<T>::load(rest, part) : Floats{};
        *reinterpret_cast<LooseFloats*>(prepared + i + part * kLanes) = values;
      }
    }
  }
}

static inline __attribute__((always_inline)) Quad sums_of_four(Floats a, Floats b, Floats c, Floats d) {
  const Quad p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const Quad pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const Quad rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

static inline __attribute__((always_inline)) void store_four(Quad values, float* out) {
  *reinterpret_cast<LooseQuad*>(out) = values;
}

static inline __attribute__((always_inline)) void store_four(Quad values, bfloat16* out) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) store(values[i], out + i);
}

// Rows of a tile: as many sums as the registers hold.
constexpr int64_t kTileRows = FIRP_VECTOR_BYTES == 64 ? 6 : 3;

// `outs` outputs of `rows` rows, both known to the compiler so that sums stay in registers. Weight rows are
// weight_stride elements apart. Every step asks for `lines` cache lines of the weights to come, from `soon` on.
template <typename T, int outs, int rows>
static inline __attribute__((always_inline)) void products(
    const float* input, int64_t stride, const T* weight, int64_t weight_stride, int64_t width, const char* soon, int64_t lines,
    Floats (&sums)[outs][rows]) {
  for (int64_t i = 0; i < width; i += Step<T>::size) {
    for (int64_t l = 0; l < lines; ++l, soon += kLineBytes) fetch_soon(soon);
#pragma GCC unroll 8
    for (int part = 0; part < Step<T>::parts; ++part) {
      Floats x[rows];
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) x[r] = *reinterpret_cast<const LooseFloats*>(input + r * stride + i + part * kLanes);
#pragma GCC unroll 4
      for (int o = 0; o < outs; ++o) {
        const Floats loaded = Step<T>::load(weight + o * weight_stride + i, part);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) sums[o][r] = fused(loaded, x[r], sums[o][r]);
      }
    }
  }
}

// Sums to outputs, `output_stride` elements from one row to the next.
template <typename T, int outs, int rows>
static inline __attribute__((always_inline)) void finish(
    const Floats (&sums)[outs][rows], const T* bias, T* output, int64_t output_stride) {
  static_assert(outs == 1 || outs == 4);
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r, output += output_stride) {
    if constexpr (outs == 4) {
      Quad four = sums_of_four(sums[0][r], sums[1][r], sums[2][r], sums[3][r]);
      if (bias) four += Quad{to_float(bias[0]), to_float(bias[1]), to_float(bias[2]), to_float(bias[3])};
      store_four(four, output);
    } else {
      store(sum(sums[0][r]) + (bias ? to_float(*bias) : 0.0f), output);
    }
  }
}

template <int outs, int rows>
static void from_floats(
    const float* input, const float* weight, int64_t stride, const bfloat16* bias, bfloat16* output, int64_t output_stride) {
  Floats sums[outs][rows] = {};
  products<float, outs, rows>(input, stride, weight, stride, stride, nullptr, 0, sums);
  finish(sums, bias, output, output_stride);
}

// The last, partial step of the weight is read from a copy padded with zeros.
template <typename T, int outs, int rows>
static void tile(const Linear<T>& args, int64_t first, int64_t row, const char* soon, int64_t lines) {
  constexpr int64_t step = Step<T>::size;
  const int64_t stride = prepared_width(args.width), whole = args.width - args.width % step;
  const float* input = args.prepared + row * stride;
  const T* weight = args.weight + first * args.weight_stride;
  Floats sums[outs][rows] = {};
  products<T, outs, rows>(input, stride, weight, args.weight_stride, whole, soon, lines, sums);
  if (whole < args.width) {
    T rest[outs][step] = {};
    for (int o = 0; o < outs; ++o) {
      std::memcpy(rest[o], weight + o * args.weight_stride + whole, (args.width - whole) * sizeof(T));
    }
    products<T, outs, rows>(input + whole, stride, rest[0], step, step, nullptr, 0, sums);
  }
  finish(sums, args.bias ? args.bias + first : nullptr, args.output + row * args.output_stride + first, args.output_stride);
}

// All rows of `outs` outputs: the first tile reads the weight rows from memory, the others find them in cache.
template <typename T, int outs>
static void all_rows(const Linear<T>& args, int64_t first, int64_t last) {
  const Fetch fetch(args, first, last, outs, kTileRows, Step<T>::size);
  for (int64_t row = 0, index = 0; row < args.rows; ++index) {
    const int64_t take = tile_rows(args.rows - row, kTileRows), lines = fetch.lines;
    const char* soon = fetch.start(index);
    if constexpr (kTileRows == 6) {
      if (take == 6) tile<T, outs, 6>(args, first, row, soon, lines);
      if (take == 5) tile<T, outs, 5>(args, first, row, soon, lines);
      if (take == 4) tile<T, outs, 4>(args, first, row, soon, lines);
    }
    if (take == 3) tile<T, outs, 3>(args, first, row, soon, lines);
    if (take == 2) tile<T, outs, 2>(args, first, row, soon, lines);
    if (take == 1) tile<T, outs, 1>(args, first, row, soon, lines);
    row += take;
  }
}

// Many rows repay writing `outs` bfloat16 weight rows once as floats, in the order of the prepared input.
template <int outs>
static void all_rows_widened(const Linear<bfloat16>& args, float* scratch, int64_t first) {
  const int64_t stride = prepared_width(args.width);
  prepare(args.weight + first * args.weight_stride, args.weight_stride, outs, args.width, scratch);
  const bfloat16* bias = args.bias ? args.bias + first : nullptr;
  for (int64_t row = 0; row < args.rows;) {
    const int64_t take = tile_rows(args.rows - row, kTileRows);
    const float* input = args.prepared + row * stride;
    bfloat16* output = args.output + row * args.output_stride + first;
    if constexpr (kTileRows == 6) {
      if (take == 6) from_floats<outs, 6>(input, scratch, stride, bias, output, args.output_stride);
      if (take == 5) from_floats<outs, 5>(input, scratch, stride, bias, output, args.output_stride);
      if (take == 4) from_floats<outs, 4>(input, scratch, stride, bias, output, args.output_stride);
    }
    if (take == 3) from_floats<outs, 3>(input, scratch, stride, bias, output, args.output_stride);
    if (take == 2) from_floats<outs, 2>(input, scratch, stride, bias, output, args.output_stride);
    if (take == 1) from_floats<outs, 1>(input, scratch, stride, bias, output, args.output_stride);
    row += take;
  }
}

// `scratch`: scratch_size floats.
template <typename T>
void linear(const Linear<T>& args, float* scratch, int64_t first, int64_t last) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (args.rows >= kManyRows) {
      for (; first + 4 <= last; first += 4) all_rows_widened<4>(args, scratch, first);
      for (; first < last; ++first) all_rows_widened<1>(args, scratch, first);
    }
  }
  for (; first + 4 <= last; first += 4) all_rows<T, 4>(args, first, last);
  for (; first < last; ++first) all_rows<T, 1>(args, first, last);
}

}  // namespace firp::cpu::FIRP_ISA
