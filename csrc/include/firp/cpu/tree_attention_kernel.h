// One instruction set's kernel of tree_attention.h; included with FIRP_ISA and FIRP_VECTOR_BYTES defined.

namespace firp::cpu::FIRP_ISA {

constexpr int64_t kPair = 2 * kLanes;
constexpr int64_t kQueries = 6;

typedef uint16_t QuadHalves __attribute__((vector_size(8)));
typedef uint32_t QuadWords __attribute__((vector_size(16)));

// Vectors of columns in a tile: as many as registers take beside six queries.
constexpr int64_t kTileColumns = FIRP_VECTOR_BYTES == 64 ? 4 : 2;

// c[i, :] (+)= a[i, 0:count] @ b[0:count, :] over `vectors` of columns; what c held is scaled first.
template <int queries, int vectors>
static inline __attribute__((always_inline)) void multiply_tile(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, float* c, int64_t c_stride,
    const float* factors) {
  Floats acc[queries][vectors] = {};
  if (factors) {
#pragma GCC unroll 6
    for (int i = 0; i < queries; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[i][v] = load(c + i * c_stride + v * kLanes) * broadcast(factors[i]);
    }
  }
  for (int64_t n = 0; n < count; ++n, b += b_stride) {
    Floats columns[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < queries; ++i) {
      const Floats x = broadcast(a[i * a_stride + n]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) acc[i][v] = fused(x, columns[v], acc[i][v]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < queries; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) save(acc[i][v], c + i * c_stride + v * kLanes);
  }
}

template <int queries>
static void multiply(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, float* c, int64_t c_stride,
    int64_t columns, const float* factors) {
  int64_t column = 0;
  if constexpr (kTileColumns > 2) {
    for (; column + kTileColumns * kLanes <= columns; column += kTileColumns * kLanes)
      multiply_tile<queries, kTileColumns>(a, a_stride, b + column, b_stride, count, c + column, c_stride, factors);
  }
  for (; column < columns; column += kPair)
    multiply_tile<queries, 2>(a, a_stride, b + column, b_stride, count, c + column, c_stride, factors);
}

static void multiply_any(
    int64_t queries, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, float* c,
    int64_t c_stride, int64_t columns, const float* factors) {
  if (queries == 6) multiply<6>(a, a_stride, b, b_stride, count, c, c_stride, columns, factors);
  if (queries == 5) multiply<5>(a, a_stride, b, b_stride, count, c, c_stride, columns, factors);
  if (queries == 4) multiply<4>(a, a_stride, b, b_stride, count, c, c_stride, columns, factors);
  if (queries == 3) multiply<3>(a, a_stride, b, b_stride, count, c, c_stride, columns, factors);
  if (queries == 2) multiply<2>(a, a_stride, b, b_stride, count, c, c_stride, columns, factors);
  if (queries == 1) multiply<1>(a, a_stride, b, b_stride, count, c, c_stride, columns, factors);
}

static inline __attribute__((always_inline)) float largest(Floats values) {
  Quad quads[kLanes / 4];
  std::memcpy(quads, &values, sizeof(values));
  for (int64_t half = kLanes / 8; half >= 1; half /= 2) {
    for (int64_t i = 0; i < half; ++i) quads[i] = quads[i] > quads[i + half] ? quads[i] : quads[i + half];
  }
  const Quad quad = quads[0];
  return std::max(std::max(quad[0], quad[1]), std::max(quad[2], quad[3]));
}

// `inside` for the lanes e + l in [first, last), `outside` for the others.
static inline __attribute__((always_inline)) Floats
within(int64_t e, int64_t first, int64_t last, Floats inside, Floats outside) {
  const Integers lanes = lane_numbers() + static_cast<int32_t>(e);
  return ((lanes >= static_cast<int32_t>(first)) & (lanes < static_cast<int32_t>(last))) ? inside : outside;
}

// Scores of one block of entries, [first, last) of which count, become weights relative to the new peak. Returns the
// factor that rescales what was summed before.
static inline float soften(float* scores, int64_t first, int64_t last, float scale, float& peak, float& total) {
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  const int64_t begin = first / kLanes * kLanes;
  const auto whole = [&](int64_t e) { return e >= first && e + kLanes <= last; };
  Floats most = broadcast(lowest);
  for (int64_t e = begin; e < last; e += kLanes) {
    Floats value = load(scores + e) * broadcast(scale);
    if (!whole(e)) value = within(e, first, last, value, broadcast(lowest));
    save(value, scores + e);
    most = value > most ? value : most;
  }
  const float top = std::max(peak, largest(most)), base = top == lowest ? 0.0f : top;
  Floats sum_ = {};
  for (int64_t e = begin; e < last; e += kLanes) {
    Floats weights = exponential(load(scores + e) - broadcast(base));
    if (!whole(e)) weights = within(e, first, last, weights, Floats{});
    save(weights, scores + e);
    sum_ += weights;
  }
  const float factor = peak == lowest ? 0.0f : exponential(broadcast(peak - base))[0];
  total = total * factor + sum(sum_);
  peak = top;
  return factor;
}

template <typename T>
static void widen_rows(const T* from, int64_t stride, int64_t rows, int64_t head_dim, float* to, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += padded) {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = to_float(from[d]);
    for (int64_t d = head_dim; d < padded; ++d) to[d] = 0.0f;
  }
}

static inline __attribute__((always_inline)) Quad widen_quad(const float* from) {
  return *reinterpret_cast<const LooseQuad*>(from);
}

static inline __attribute__((always_inline)) Quad widen_quad(const bfloat16* from) {
  QuadHalves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return reinterpret_cast<Quad>(__builtin_convertvector(halves, QuadWords) << 16);
}

// Keys of up to kBlock slots, transposed: to[d * kBlock + slot]; slots past `rows` become zero, up to a multiple of kPair.
template <typename T>
static void transpose_rows(const T* from, int64_t stride, int64_t rows, int64_t head_dim, float* to) {
  const int64_t padded = (rows + kPair - 1) / kPair * kPair;
  const int64_t whole_rows = rows / 4 * 4, whole_width = head_dim / 4 * 4;
  for (int64_t r = 0; r < whole_rows; r += 4, from += 4 * stride) {
    for (int64_t d = 0; d < whole_width; d += 4) {
      const Quad a = widen_quad(from + d), b = widen_quad(from + stride + d);
      const Quad c = widen_quad(from + 2 * stride + d), e = widen_quad(from + 3 * stride + d);
      const Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ce = __builtin_shufflevector(c, e, 0, 4, 1, 5);
      const Quad more_ab = __builtin_shufflevector(a, b, 2, 6, 3, 7), more_ce = __builtin_shufflevector(c, e, 2, 6, 3, 7);
      float* out = to + d * kBlock + r;
      *reinterpret_cast<LooseQuad*>(out) = __builtin_shufflevector(ab, ce, 0, 1, 4, 5);
      *reinterpret_cast<LooseQuad*>(out + kBlock) = __builtin_shufflevector(ab, ce, 2, 3, 6, 7);
      *reinterpret_cast<LooseQuad*>(out + 2 * kBlock) = __builtin_shufflevector(more_ab, more_ce, 0, 1, 4, 5);
      *reinterpret_cast<LooseQuad*>(out + 3 * kBlock) = __builtin_shufflevector(more_ab, more_ce, 2, 3, 6, 7);
    }
    for (int64_t d = whole_width; d < head_dim; ++d) {
      for (int64_t i = 0; i < 4; ++i) to[d * kBlock + r + i] = to_float(from[i * stride + d]);
    }
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int64_t r = whole_rows; r < rows; ++r) to[d * kBlock + r] = to_float(from[(r - whole_rows) * stride + d]);
    for (int64_t r = rows; r < padded; ++r) to[d * kBlock + r] = 0.0f;
  }
}

template <typename T>
void tree_attention(const TreeAttention<T>& args, int64_t batch, int64_t kv_head, int64_t first_row, int64_t last_row) {
  const int64_t group = args.heads / args.kv_heads, context = args.context_lens[batch], head_dim = args.head_dim;
  const int64_t count = (last_row - first_row) * group, padded = (head_dim + kPair - 1) / kPair * kPair;
  const int64_t whole = context / kBlock * kBlock, rest = context - whole;
  // The step's own slots follow the context's: where both fit, they share a block.
  const bool together = rest + args.rows <= kBlock;
  const int64_t own = together ? rest : kBlock;
  const int64_t open_slots = together ? kBlock : kBlock + (args.rows + kBlock - 1) / kBlock * kBlock;
  const float scale = static_cast<float>(args.scale);
  const T* keys = args.key + batch * args.key_batch + kv_head * args.key_head;
  const T* values = args.value + batch * args.value_batch + kv_head * args.value_head;

  const std::unique_ptr<float[]> memory(
      new float
          [count * (2 * padded + 2 + open_slots) + kBlock * (head_dim + padded) + kQueries * kBlock + open_slots * padded]);
  float* queries = memory.get();
  float* sums = queries + count * padded;
  float* peaks = sums + count * padded;
  float* totals = peaks + count;
  float* open_scores = totals + count;
  float* block_keys = open_scores + count * open_slots;
  float* block_values = block_keys + kBlock * head_dim;
  float* scores = block_values + kBlock * padded;
  float* open_values = scores + kQueries * kBlock;

  std::vector<RowView> views;
  int64_t oldest = context;
  for (int64_t row = first_row; row < last_row; ++row) {
    views.push_back(row_view(args, batch, row));
    oldest = std::min(oldest, views.back().first);
    const T* query = args.query + batch * args.query_batch + row * args.query_row + kv_head * group * args.query_head;
    widen_rows(query, args.query_head, group, head_dim, queries + (row - first_row) * group * padded, padded);
  }
  std::fill(sums, sums + count * padded, 0.0f);
  std::fill(peaks, peaks + count, -std::numeric_limits<float>::infinity());
  std::fill(totals, totals + count, 0.0f);

  for (int64_t start = oldest / kBlock * kBlock; start < whole; start += kBlock) {
    transpose_rows(keys + start * args.key_slot, args.key_slot, kBlock, head_dim, block_keys);
    widen_rows(values + start * args.value_slot, args.value_slot, kBlock, head_dim, block_values, padded);
    for (int64_t q = 0; q < count; q += kQueries) {
      const int64_t some = std::min(kQueries, count - q);
      multiply_any(some, queries + q * padded, padded, block_keys, kBlock, head_dim, scores, kBlock, kBlock, nullptr);
      float factors[kQueries];
      bool all_see_all = true;
      for (int64_t i = 0; i < some; ++i) {
        const int64_t first = views[(q + i) / group].first - start;
        all_see_all &= first <= 0;
        if (first < kBlock) {
          factors[i] = soften(scores + i * kBlock, std::max<int64_t>(first, 0), kBlock, scale, peaks[q + i], totals[q + i]);
        }
      }
      if (all_see_all) {
        multiply_any(some, scores, kBlock, block_values, padded, kBlock, sums + q * padded, padded, padded, factors);
        continue;
      }
      for (int64_t i = 0; i < some; ++i) {
        const int64_t first = std::max<int64_t>(views[(q + i) / group].first - start, 0);
        if (first >= kBlock) continue;
        multiply<1>(
            scores + i * kBlock + first, kBlock, block_values + first * padded, padded, kBlock - first, sums + (q + i) * padded,
            padded, padded, factors + i);
      }
    }
  }

  // The entries left: what the context has past its whole blocks, then each row's own slots of the step.
  for (int64_t block = 0; block < open_slots; block += kBlock) {
    const int64_t start = block ? context + block - kBlock : whole;
    const int64_t slots = block ? std::min(kBlock, args.rows + kBlock - block) : together ? rest + args.rows : rest;
    if (slots == 0) continue;
    transpose_rows(keys + start * args.key_slot, args.key_slot, slots, head_dim, block_keys);
    for (int64_t q = 0; q < count; q += kQueries) {
      multiply_any(
          std::min(kQueries, count - q), queries + q * padded, padded, block_keys, kBlock, head_dim,
          open_scores + q * open_slots + block, open_slots, (slots + kPair - 1) / kPair * kPair, nullptr);
    }
  }
  widen_rows(values + whole * args.value_slot, args.value_slot, rest, head_dim, open_values, padded);
  for (int64_t row = first_row; row < last_row; ++row) {
    const RowView& view = views[row - first_row];
    const int64_t open = rest + static_cast<int64_t>(view.tail.size()), first = std::max<int64_t>(view.first - whole, 0);
    for (int64_t e = rest + shared_tail(views, row - first_row); e < open; ++e) {
      widen_rows(values + (context + view.tail[e - rest]) * args.value_slot, 0, 1, head_dim, open_values + e * padded, padded);
    }
    for (int64_t head = 0; head < group; head += kQueries) {
      const int64_t q = (row - first_row) * group + head, some = std::min(kQueries, group - head);
      for (int64_t done = 0; done < open; done += kBlock) {
        const int64_t last = std::min(kBlock, open - done), from = std::clamp<int64_t>(first - done, 0, last);
        if (from == last) continue;
        float factors[kQueries];
        for (int64_t i = 0; i < some; ++i) {
          const float* all = open_scores + (q + i) * open_slots;
          float* block = scores + i * kBlock;
          const int64_t before = std::clamp<int64_t>(rest - done, 0, last);
          std::copy(all, all + before, block);
          for (int64_t e = before; e < last; ++e) block[e] = all[own + view.tail[done + e - rest]];
          factors[i] = soften(block, from, last, scale, peaks[q + i], totals[q + i]);
        }
        multiply_any(
            some, scores + from, kBlock, open_values + (done + from) * padded, padded, last - from, sums + q * padded, padded,
            padded, factors);
      }
    }
  }
  for (int64_t q = 0; q < count; ++q) {
    T* out = args.output + ((batch * args.rows + first_row + q / group) * args.heads + kv_head * group + q % group) * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) store(sums[q * padded + d] / totals[q], out + d);
  }
}

}  // namespace firp::cpu::FIRP_ISA
