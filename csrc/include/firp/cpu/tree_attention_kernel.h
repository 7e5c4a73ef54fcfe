// One instruction set's kernel of tree_attention.h; included with FIRP_ISA and FIRP_VECTOR_BYTES defined.

namespace firp::cpu::FIRP_ISA {

constexpr int64_t kPair = 2 * kLanes;
constexpr int64_t kQueries = 4;

// acc[i][:] = sum over n of a[i * a_stride + n] * b[n * b_stride + :] on top of what acc holds, in the order of n.
template <int queries>
static inline __attribute__((always_inline)) void multiply_pair(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, Floats (&acc)[queries][2]) {
  for (int64_t n = 0; n < count; ++n, b += b_stride) {
    const Floats low = load(b), high = load(b + kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) {
      const Floats x = broadcast(a[i * a_stride + n]);
      acc[i][0] = fused(x, low, acc[i][0]);
      acc[i][1] = fused(x, high, acc[i][1]);
    }
  }
}

// c[i, :] (+)= a[i, 0:count] @ b[0:count, :] over `columns` (a multiple of kPair); what c held is scaled first.
template <int queries>
static void multiply(
    const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, float* c, int64_t c_stride,
    int64_t columns, const float* factors) {
  for (int64_t column = 0; column < columns; column += kPair) {
    Floats acc[queries][2] = {};
    if (factors) {
#pragma GCC unroll 4
      for (int i = 0; i < queries; ++i) {
        acc[i][0] = load(c + i * c_stride + column) * broadcast(factors[i]);
        acc[i][1] = load(c + i * c_stride + column + kLanes) * broadcast(factors[i]);
      }
    }
    multiply_pair<queries>(a, a_stride, b + column, b_stride, count, acc);
#pragma GCC unroll 4
    for (int i = 0; i < queries; ++i) {
      save(acc[i][0], c + i * c_stride + column);
      save(acc[i][1], c + i * c_stride + column + kLanes);
    }
  }
}

static void multiply_any(
    int64_t queries, const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count, float* c,
    int64_t c_stride, int64_t columns, const float* factors) {
  if (queries == 4) multiply<4>(a, a_stride, b, b_stride, count, c, c_stride, columns, factors);
  if (queries == 3) multiply<3>(a, a_stride, b, b_stride, count, c, c_stride, columns, factors);
  if (queries == 2) multiply<2>(a, a_stride, b, b_stride, count, c, c_stride, columns, factors);
  if (queries == 1) multiply<1>(a, a_stride, b, b_stride, count, c, c_stride, columns, factors);
}

// Scores of one block of entries, [first, last) of which count, become weights relative to the new peak; the others
// become zero. Returns the factor that rescales what was summed before.
static inline float soften(float* scores, int64_t first, int64_t last, float& peak, float& total) {
  float top = peak;
  for (int64_t e = first; e < last; ++e) top = scores[e] > top ? scores[e] : top;
  for (int64_t e = 0; e < first; ++e) scores[e] = 0.0f;
  for (int64_t e = last; e < kBlock; ++e) scores[e] = 0.0f;
  const float base = top == -std::numeric_limits<float>::infinity() ? 0.0f : top;
  Floats sum_ = {};
  for (int64_t e = 0; e < kBlock; e += kLanes) {
    Floats weights = exponential(load(scores + e) - broadcast(base));
    if (e < first || e + kLanes > last) {
      float kept[kLanes];
      save(weights, kept);
      for (int64_t i = 0; i < kLanes; ++i) kept[i] = e + i >= first && e + i < last ? kept[i] : 0.0f;
      weights = load(kept);
    }
    save(weights, scores + e);
    sum_ += weights;
  }
  const float factor = peak == -std::numeric_limits<float>::infinity() ? 0.0f : exponential(broadcast(peak - base))[0];
  total = total * factor + sum(sum_);
  peak = top;
  return factor;
}

template <typename T>
static void widen_rows(const T* from, int64_t stride, int64_t rows, int64_t width, float* to, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += padded) {
    for (int64_t d = 0; d < width; ++d) to[d] = to_float(from[d]);
    for (int64_t d = width; d < padded; ++d) to[d] = 0.0f;
  }
}

// Keys of up to kBlock slots, transposed: to[d * kBlock + slot]; slots past `rows` become zero.
template <typename T>
static void transpose_rows(const T* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  for (int64_t d = 0; d < width; ++d) {
    for (int64_t r = 0; r < rows; ++r) to[d * kBlock + r] = to_float(from[r * stride + d]);
    for (int64_t r = rows; r < kBlock; ++r) to[d * kBlock + r] = 0.0f;
  }
}

template <typename T>
void tree_attention(const TreeAttention<T>& args, int64_t batch, int64_t kv_head, int64_t first_row, int64_t last_row) {
  const int64_t group = args.heads / args.kv_heads, context = args.context_lens[batch], width = args.width;
  const int64_t count = (last_row - first_row) * group, padded = (width + kPair - 1) / kPair * kPair;
  const int64_t tail_blocks = (args.rows + kBlock - 1) / kBlock, tail_slots = tail_blocks * kBlock;
  const float scale = static_cast<float>(args.scale);
  const int64_t whole = context / kBlock * kBlock, rest = context - whole;
  const T* keys = args.key + batch * args.key_batch + kv_head * args.key_head;
  const T* values = args.value + batch * args.value_batch + kv_head * args.value_head;

  const std::unique_ptr<float[]> memory(new float[count * (2 * padded + 3 + tail_slots) + kBlock * (width + padded) + kQueries * kBlock + args.rows * padded]);
  float* queries = memory.get();
  float* sums = queries + count * padded;
  float* peaks = sums + count * padded;
  float* totals = peaks + count;
  float* factors = totals + count;
  float* tail_scores = factors + count;
  float* block_keys = tail_scores + count * tail_slots;
  float* block_values = block_keys + kBlock * width;
  float* scores = block_values + kBlock * padded;
  float* tail_values = scores + kQueries * kBlock;

  std::vector<RowView> views;
  for (int64_t row = first_row; row < last_row; ++row) {
    views.push_back(row_view(args, batch, row));
    const T* query = args.query + batch * args.query_batch + row * args.query_row + kv_head * group * args.query_head;
    widen_rows(query, args.query_head, group, width, queries + (row - first_row) * group * padded, padded);
  }
  std::fill(sums, sums + count * padded, 0.0f);
  std::fill(peaks, peaks + count, -std::numeric_limits<float>::infinity());
  std::fill(totals, totals + count, 0.0f);

  for (int64_t start = 0; start < whole; start += kBlock) {
    transpose_rows(keys + start * args.key_slot, args.key_slot, kBlock, width, block_keys);
    widen_rows(values + start * args.value_slot, args.value_slot, kBlock, width, block_values, padded);
    for (int64_t q = 0; q < count; q += kQueries) {
      const int64_t some = std::min(kQueries, count - q);
      multiply_any(some, queries + q * padded, padded, block_keys, kBlock, width, scores, kBlock, kBlock, nullptr);
      bool all_see_all = true;
      for (int64_t i = 0; i < some; ++i) {
        float* row = scores + i * kBlock;
        const int64_t first = views[(q + i) / group].first - start;
        for (int64_t e = 0; e < kBlock; e += kLanes) save(load(row + e) * broadcast(scale), row + e);
        factors[q + i] = first >= kBlock ? 1.0f : soften(row, std::max<int64_t>(first, 0), kBlock, peaks[q + i], totals[q + i]);
        all_see_all &= first <= 0;
      }
      if (all_see_all) {
        multiply_any(some, scores, kBlock, block_values, padded, kBlock, sums + q * padded, padded, padded, factors + q);
        continue;
      }
      for (int64_t i = 0; i < some; ++i) {
        const int64_t first = std::clamp<int64_t>(views[(q + i) / group].first - start, 0, kBlock);
        multiply<1>(
            scores + i * kBlock + first, kBlock, block_values + first * padded, padded, kBlock - first,
            sums + (q + i) * padded, padded, padded, factors + q + i);
      }
    }
  }

  for (int64_t block = 0; block < tail_blocks; ++block) {
    const int64_t start = block * kBlock, some = std::min(kBlock, args.rows - start);
    transpose_rows(keys + (context + start) * args.key_slot, args.key_slot, some, width, block_keys);
    for (int64_t q = 0; q < count; q += kQueries) {
      multiply_any(
          std::min(kQueries, count - q), queries + q * padded, padded, block_keys, kBlock, width,
          tail_scores + q * tail_slots + start, tail_slots, kBlock, nullptr);
    }
  }
  widen_rows(values + context * args.value_slot, args.value_slot, args.rows, width, tail_values, padded);
  transpose_rows(keys + whole * args.key_slot, args.key_slot, rest, width, block_keys);
  widen_rows(values + whole * args.value_slot, args.value_slot, rest, width, block_values, padded);

  for (int64_t q = 0; q < count; ++q) {
    const RowView& view = views[q / group];
    const int64_t tail = static_cast<int64_t>(view.tail.size());
    for (int64_t done = 0; done < rest + tail || done == 0; done += kBlock) {
      const int64_t last = std::min(kBlock, rest + tail - done);
      const int64_t shared = std::clamp<int64_t>(rest - done, 0, last), first = std::clamp<int64_t>(view.first - whole - done, 0, shared);
      if (shared) multiply<1>(queries + q * padded, padded, block_keys, kBlock, width, scores, kBlock, kBlock, nullptr);
      for (int64_t e = shared; e < last; ++e) scores[e] = tail_scores[q * tail_slots + view.tail[done + e - rest]];
      for (int64_t e = 0; e < last; ++e) scores[e] *= scale;
      const float factor = soften(scores, first, last, peaks[q], totals[q]);
      multiply<1>(
          scores + first, kBlock, block_values + first * padded, padded, shared - first, sums + q * padded, padded, padded, &factor);
      for (int64_t e = shared; e < last; ++e) {
        const float one = 1.0f;
        multiply<1>(
            scores + e, kBlock, tail_values + view.tail[done + e - rest] * padded, padded, 1, sums + q * padded, padded, padded, &one);
      }
    }
    T* out = args.output + ((batch * args.rows + first_row + q / group) * args.heads + kv_head * group + q % group) * width;
    for (int64_t d = 0; d < width; ++d) store(sums[q * padded + d] / totals[q], out + d);
  }
}

}  // namespace firp::cpu::FIRP_ISA
