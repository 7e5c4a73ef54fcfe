// The linear of firp/cpu/linear.h over tensors: rows prepared once, outputs shared out among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <c10/util/accumulate.h>

#include "firp/cpu/linear.h"

namespace firp {

// Outputs a thread takes at a time: whole tiles of four, enough of them to repay handing out the work.
constexpr int64_t kGrain = 64;

// `input` [..., width] as the kernel reads it, [rows, prepared width].
template <typename T>
at::Tensor prepare_rows(const at::Tensor& input) {
  const int64_t width = input.size(-1);
  const at::Tensor dense = input.dim() == 2 && input.stride(1) == 1 ? input : input.contiguous();
  const int64_t rows = c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
  at::Tensor prepared = at::empty({rows, cpu::prepared_width(width)}, input.options().dtype(at::kFloat));
  cpu::prepare(
      cpu::best_isa(), static_cast<const T*>(dense.const_data_ptr()), dense.dim() == 2 ? dense.stride(0) : width, rows, width,
      prepared.data_ptr<float>());
  return prepared;
}

// [..., outputs] for an `input` [..., width].
inline at::Tensor empty_outputs(const at::Tensor& input, int64_t outputs) {
  c10::SmallVector<int64_t, 4> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = outputs;
  return at::empty(shape, input.options());
}

// Prepared rows times `weight` [outputs, width], whose last dimension is dense, to the dense `output` [..., outputs or more].
template <typename T>
cpu::Linear<T> describe_linear(
    const at::Tensor& prepared, const at::Tensor& weight, const at::Tensor* bias, at::Tensor& output) {
  return {
      .prepared = prepared.const_data_ptr<float>(),
      .weight = static_cast<const T*>(weight.const_data_ptr()),
      .bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
      .output = static_cast<T*>(output.mutable_data_ptr()),
      .rows = prepared.size(0),
      .width = weight.size(1),
      .outputs = weight.size(0),
      .weight_stride = weight.stride(0),
      .output_stride = output.size(-1),
  };
}

// Outputs rounded up to whole tiles of four.
inline int64_t whole_tiles(int64_t outputs) { return (outputs + 3) / 4 * 4; }

// work(scratch, first, last) over ranges of outputs that tile them all.
template <typename Work>
void over_outputs(int64_t outputs, int64_t width, const Work& work) {
  at::parallel_for(0, whole_tiles(outputs) / 4, kGrain / 4, [&](int64_t first, int64_t last) {
    const at::Tensor scratch = at::empty({cpu::scratch_size(width)}, at::kFloat);
    work(scratch.data_ptr<float>(), 4 * first, std::min(4 * last, outputs));
  });
}

inline at::Tensor dense_weight(const at::Tensor& weight) { return weight.stride(1) == 1 ? weight : weight.contiguous(); }

}  // namespace firp
