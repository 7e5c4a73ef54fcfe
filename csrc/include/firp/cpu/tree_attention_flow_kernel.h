// The bfloat16 attention of tree_attention.h over pairs: scores over pairs of the head dimension, sums over pairs of
// entries, whose weights are rounded to bfloat16. Keys and values are laid out so that one vector holds a pair for
// sixteen slots or for sixteen columns (tree_attention_pairs_kernel.h). `Products` multiplies them: tiles of queries by
// the slots of a block, and by the columns of the values. Included for the instruction set of AVX-512 BF16.
#include "firp/cpu/tree_attention_pairs_kernel.h"

namespace firp::cpu::avx512_bf16 {

constexpr int64_t kTileVectors = kBlock / kGroup;
static_assert(kTileVectors == 4);

// 2^x for x <= 0; below -126 as at -126. NaN stays NaN. The polynomial is Taylor's, within 4e-6 on half a unit each way,
// far below what rounding to bfloat16 loses.
static inline __attribute__((always_inline)) __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(9.6181291e-3f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// Scores of one block of entries, [first, last) of which count, become weights relative to the new peak, rounded to
// bfloat16 pairs; the others become zero. Returns the factor that rescales what was summed before.
static inline __attribute__((always_inline)) float soften(
    const float* scores, int64_t first, int64_t last, float& peak, float* totals, uint32_t* weights) {
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const uint64_t seen = (last >= kBlock ? ~uint64_t{0} : (uint64_t{1} << last) - 1) & ~uint64_t{0} << first;
  __m512 values[kTileVectors];
  __mmask16 kept[kTileVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kTileVectors; ++v) {
    kept[v] = static_cast<__mmask16>(seen >> (v * kGroup));
    values[v] = _mm512_mask_loadu_ps(nothing, kept[v], scores + v * kGroup);
  }
  const __m512 most = _mm512_max_ps(_mm512_max_ps(values[0], values[1]), _mm512_max_ps(values[2], values[3]));
  const float top = std::max(peak, _mm512_reduce_max_ps(most));
  const __m512 base = _mm512_set1_ps(top == -std::numeric_limits<float>::infinity() ? 0.0f : top);
#pragma GCC unroll 4
  for (int v = 0; v < kTileVectors; ++v) values[v] = _mm512_maskz_mov_ps(kept[v], power_of_two(_mm512_sub_ps(values[v], base)));
  const float factor = _mm512_cvtss_f32(power_of_two(_mm512_sub_ps(_mm512_set1_ps(peak), base)));
  peak = top;
  const __m512 sum = _mm512_add_ps(_mm512_add_ps(values[0], values[1]), _mm512_add_ps(values[2], values[3]));
  _mm512_storeu_ps(totals, _mm512_fmadd_ps(_mm512_loadu_ps(totals), _mm512_set1_ps(factor), sum));
  _mm512_storeu_si512(weights, (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0]));
  _mm512_storeu_si512(weights + kGroup, (__m512i)_mm512_cvtne2ps_pbh(values[3], values[2]));
  return factor;
}

// Calls f(queries, first query) for each tile.
template <typename Products, typename Function>
static inline __attribute__((always_inline)) void for_each_tile(int64_t count, const Function& f) {
  for (int64_t q = 0; q < count; q += Products::kQueries) f(std::min(Products::kQueries, count - q), q);
}

template <typename Products>
static void attend(const TreeAttention<bfloat16>& args, int64_t batch, int64_t kv_head, int64_t first_row, int64_t last_row) {
  const int64_t group = args.heads / args.kv_heads, context = args.context_lens[batch], head_dim = args.head_dim;
  const int64_t count = (last_row - first_row) * group, padded = (head_dim + 31) / 32 * 32;
  const int64_t whole = context / kBlock * kBlock, rest = context - whole;
  const int64_t tail_slots = (args.rows + kBlock - 1) / kBlock * kBlock, open_slots = kBlock + tail_slots;
  const float scale = static_cast<float>(args.scale * 1.4426950408889634);
  constexpr int64_t kTile = Products::kQueries;
  Products products;
  const bfloat16* keys = args.key + batch * args.key_batch + kv_head * args.key_head;
  const bfloat16* values = args.value + batch * args.value_batch + kv_head * args.value_head;

  const int64_t words = count * (padded / 2 + padded + kGroup + 1 + open_slots) + kBlock * padded / 2 + kBlock / 2 * padded +
      kTile * (kBlock + kBlock / 2) + open_slots / 2 * padded;
  const std::unique_ptr<uint32_t[]> memory(new uint32_t[words]);
  uint32_t* queries = memory.get();
  uint32_t* block_keys = queries + count * padded / 2;
  uint32_t* block_values = block_keys + kBlock * padded / 2;
  uint32_t* open_values = block_values + kBlock / 2 * padded;
  uint32_t* weights = open_values + open_slots / 2 * padded;
  float* scores = reinterpret_cast<float*>(weights + kTile * kBlock / 2);
  float* open_scores = scores + kTile * kBlock;
  float* sums = open_scores + count * open_slots;
  float* totals = sums + count * padded;
  float* peaks = totals + count * kGroup;
  std::fill(sums, peaks, 0.0f);
  std::fill(peaks, peaks + count, -std::numeric_limits<float>::infinity());
  std::memset(queries, 0, count * padded * 2);

  std::vector<RowView> views;
  int64_t oldest = context;
  for (int64_t row = first_row; row < last_row; ++row) {
    views.push_back(row_view(args, batch, row));
    oldest = std::min(oldest, views.back().first);
    for (int64_t head = 0; head < group; ++head) {
      const bfloat16* query =
          args.query + batch * args.query_batch + row * args.query_row + (kv_head * group + head) * args.query_head;
      std::memcpy(queries + ((row - first_row) * group + head) * padded / 2, query, head_dim * 2);
    }
  }

  for (int64_t start = oldest / kBlock * kBlock; start < whole; start += kBlock) {
    pair_keys(keys + start * args.key_slot, args.key_slot, kBlock, head_dim, block_keys);
    for (int64_t e = 0; e < kBlock; e += 2) {
      const bfloat16* even = values + (start + e) * args.value_slot;
      pair_values(even, even + args.value_slot, head_dim, block_values + e / 2 * padded);
    }
    for_each_tile<Products>(count, [&](int64_t some, int64_t q) __attribute__((always_inline)) {
      products.score(some, queries + q * padded / 2, block_keys, padded, scale, scores, kBlock);
      float factors[kTile];
      bool all_see_all = true;
      for (int i = 0; i < some; ++i) all_see_all &= views[(q + i) / group].first <= start;
      if (all_see_all) {
        for (int i = 0; i < some; ++i) {
          factors[i] =
              soften(scores + i * kBlock, 0, kBlock, peaks[q + i], totals + (q + i) * kGroup, weights + i * kBlock / 2);
        }
        products.add(some, weights, block_values, padded, 0, kBlock, factors, sums + q * padded);
        return;
      }
      for (int i = 0; i < some; ++i) {
        const int64_t first = std::max<int64_t>(views[(q + i) / group].first - start, 0);
        if (first >= kBlock) continue;
        factors[i] = soften(scores + i * kBlock, first, kBlock, peaks[q + i], totals + (q + i) * kGroup, weights);
        products.add(1, weights, block_values, padded, first, kBlock, factors + i, sums + (q + i) * padded);
      }
    });
  }

  for (int64_t block = 0; block < open_slots; block += kBlock) {
    const int64_t start = block ? context + block - kBlock : whole;
    const int64_t slots = block ? std::min(kBlock, args.rows + kBlock - block) : rest;
    if (slots == 0) continue;
    pair_keys(keys + start * args.key_slot, args.key_slot, slots, head_dim, block_keys);
    for_each_tile<Products>(count, [&](int64_t some, int64_t q) __attribute__((always_inline)) {
      products.score(
          some, queries + q * padded / 2, block_keys, padded, scale, open_scores + q * open_slots + block, open_slots);
    });
  }
  for (int64_t e = 0; e + 1 < rest; e += 2) {
    const bfloat16* even = values + (whole + e) * args.value_slot;
    pair_values(even, even + args.value_slot, head_dim, open_values + e / 2 * padded);
  }
  for (int64_t row = first_row; row < last_row; ++row) {
    const RowView& view = views[row - first_row];
    const int64_t open = rest + static_cast<int64_t>(view.tail.size()), first = std::max<int64_t>(view.first - whole, 0);
    const auto slot = [&](int64_t e) { return e < rest ? whole + e : context + view.tail[e - rest]; };
    for (int64_t e = (rest + shared_tail(views, row - first_row)) / 2 * 2; e < open; e += 2) {
      const bfloat16* odd = e + 1 < open ? values + slot(e + 1) * args.value_slot : nullptr;
      pair_values(values + slot(e) * args.value_slot, odd, head_dim, open_values + e / 2 * padded);
    }
    for (int64_t e = (open + 1) / 2 * 2; e % Products::kEntries; e += 2) {
      std::memset(open_values + e / 2 * padded, 0, padded * sizeof(uint32_t));
    }
    for_each_tile<Products>(group, [&](int64_t some, int64_t head) __attribute__((always_inline)) {
      const int64_t q = (row - first_row) * group + head;
      for (int64_t done = 0; done < open; done += kBlock) {
        const int64_t last = std::min(kBlock, open - done), from = std::clamp<int64_t>(first - done, 0, last);
        if (from == last) continue;
        const int64_t shared = std::clamp<int64_t>(rest - done, 0, last);
        float factors[kTile];
        for (int i = 0; i < some; ++i) {
          const float* all = open_scores + (q + i) * open_slots;
          std::copy_n(all, shared, scores);
          for (int64_t e = shared; e < last; ++e) scores[e] = all[kBlock + view.tail[done + e - rest]];
          factors[i] = soften(scores, from, last, peaks[q + i], totals + (q + i) * kGroup, weights + i * kBlock / 2);
        }
        products.add(some, weights, open_values + done / 2 * padded, padded, from, last, factors, sums + q * padded);
      }
    });
  }
  for (int64_t q = 0; q < count; ++q) {
    const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(totals + q * kGroup));
    bfloat16* out =
        args.output + ((batch * args.rows + first_row + q / group) * args.heads + kv_head * group + q % group) * head_dim;
    for (int64_t d = 0; d < head_dim; ++d) store(sums[q * padded + d] / total, out + d);
  }
}

}  // namespace firp::cpu::avx512_bf16
