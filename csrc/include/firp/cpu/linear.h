// output = input @ weight^T + bias for few rows, each weight read once per block of rows.
//
// Work on outputs [first, last) by one thread; threads share nothing. The result of a row is the same bits whatever
// the other rows are and however many: every (row, output) pair has one accumulator vector, filled in one order and
// summed in one order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "firp/cpu/isa.h"
#include "firp/cpu/number.h"
#include "firp/cpu/vectors.h"

namespace firp::cpu {

// Weights are [outputs, width] with rows weight_stride apart; bias may be null. `prepared` is what `prepare` made.
template <typename T>
struct Linear {
  const float* prepared;
  const T* weight;
  const T* bias;
  T* output;
  int64_t rows, width, outputs, weight_stride;
};

// Floats a prepared row takes: a whole number of the widest weight loads (32 elements).
inline int64_t prepared_width(int64_t width) { return (width + 31) / 32 * 32; }

// Rows from which bfloat16 weights are widened once instead of with every use; measured on AVX2.
constexpr int64_t kManyRows = 10;

// Floats of scratch one thread needs: four weight rows, widened.
inline int64_t scratch_size(int64_t width) { return 4 * prepared_width(width); }

}  // namespace firp::cpu

#define FIRP_KERNEL "firp/cpu/linear_kernel.h"
#include "firp/cpu/for_each_isa.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512bf16")
#endif
#include "firp/cpu/linear_dot_kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace firp::cpu {

// Input [rows, width], rows input_stride apart, to float rows of prepared_width in the order the kernel of `isa` reads.
template <typename T>
void prepare(Isa isa, const T* input, int64_t input_stride, int64_t rows, int64_t width, float* prepared) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (isa == Isa::avx512_bf16) return avx512_bf16::prepare(input, input_stride, rows, width, prepared);
  }
  if (isa >= Isa::avx512) return avx512::prepare(input, input_stride, rows, width, prepared);
  if (isa == Isa::avx2) return avx2::prepare(input, input_stride, rows, width, prepared);
#endif
  portable::prepare(input, input_stride, rows, width, prepared);
}

template <typename T>
void linear(Isa isa, const Linear<T>& args, float* scratch, int64_t first, int64_t last) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (isa == Isa::avx512_bf16) return avx512_bf16::linear(args, first, last);
  }
  if (isa >= Isa::avx512) return avx512::linear(args, scratch, first, last);
  if (isa == Isa::avx2) return avx2::linear(args, scratch, first, last);
#endif
  portable::linear(args, scratch, first, last);
}

}  // namespace firp::cpu
