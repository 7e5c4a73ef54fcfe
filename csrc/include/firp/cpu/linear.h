// output = input @ weight^T + bias for few rows, each weight read once per block of rows.
//
// Work on outputs [first, last) by one thread; threads share nothing. The result of a row is the same bits for any
// other rows and any number of them, a NaN's sign and payload aside: every (row, output) pair has one accumulator, a vector
// or a float of a tile, filled in one order and summed in one order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "firp/cpu/isa.h"
#include "firp/cpu/number.h"
#include "firp/cpu/pairs.h"
#include "firp/cpu/vector.h"

namespace firp::cpu {

// Weights are [outputs, width] with rows weight_stride apart, output rows lie output_stride apart; bias may be null.
// `prepared` is what `prepare` made.
template <typename T>
struct Linear {
  const float* prepared;
  const T* weight;
  const T* bias;
  T* output;
  int64_t rows, width, outputs, weight_stride, output_stride;
};

// Rows of an input, `stride` apart.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride, count, width;
};

// Floats that a prepared row needs: a whole number of the widest weight loads (32 elements).
inline int64_t prepared_width(int64_t width) { return (width + 31) / 32 * 32; }

// Whether rows are as `prepare` would copy them.
template <typename T>
bool lies_prepared(const Rows<T>& rows) {
  return std::is_same_v<T, float> && rows.stride == prepared_width(rows.width) && rows.width == rows.stride;
}

constexpr int64_t kLineBytes = 64;

// Into the second-level cache: the first-level cache keeps the inputs.
// Inlined early: a compiler may take a function that only prefetches for one without effect, and drop its calls.
__attribute__((always_inline)) inline void fetch_soon(const char* line) { __builtin_prefetch(line, 0, 2); }

// Prepared rows that stay in the second-level cache while all outputs pass over them: 256 KiB, unless those are few rows.
inline int64_t cached_rows(int64_t width) {
  return std::max<int64_t>(24, (1 << 16) / std::max<int64_t>(prepared_width(width), 1));
}

// Rows of the next tile, of those left: tiles of about one size.
inline int64_t tile_rows(int64_t left, int64_t most) {
  const int64_t tiles = (left + most - 1) / most;
  return (left + tiles - 1) / tiles;
}

// Floats of scratch one thread needs: four weight rows, widened.
inline int64_t scratch_size(int64_t width) { return 4 * prepared_width(width); }

}  // namespace firp::cpu

#define FIRP_KERNEL "firp/cpu/linear_kernel.h"
#define FIRP_DOT_KERNEL "firp/cpu/linear_dot_kernel.h"
#define FIRP_TILE_KERNEL "firp/cpu/linear_tile_kernel.h"
#include "firp/cpu/for_each_isa.h"

namespace firp::cpu {

// Rows [first, last) of `rows` as the kernel of `isa` reads them. `prepared` is for all of them: rows.count times
// prepared_width floats. Where a row lies in it, only that kernel knows.
template <typename T>
void prepare(Isa isa, const Rows<T>& rows, int64_t first, int64_t last, float* prepared) {
  FIRP_DISPATCH_TILE(prepare(rows, first, last, prepared));
}

// Outputs [first, last); `scratch` holds scratch_size floats.
template <typename T>
void linear(Isa isa, const Linear<T>& args, float* scratch, int64_t first, int64_t last) {
  FIRP_DISPATCH_TILE(linear(args, scratch, first, last));
}

}  // namespace firp::cpu
