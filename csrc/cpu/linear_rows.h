// The linear of firp/cpu/linear.h over tensors: rows prepared once, outputs shared out among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "firp/cpu/linear.h"

namespace firp {

// Compiled once, by linear.cpp.
extern template void cpu::prepare(cpu::Isa, const cpu::Rows<float>&, int64_t, int64_t, float*);
extern template void cpu::prepare(cpu::Isa, const cpu::Rows<cpu::bfloat16>&, int64_t, int64_t, float*);
extern template void cpu::linear(cpu::Isa, const cpu::Linear<float>&, float*, int64_t, int64_t);
extern template void cpu::linear(cpu::Isa, const cpu::Linear<cpu::bfloat16>&, float*, int64_t, int64_t);

// Outputs a thread takes at a time: whole tiles of four, enough of them to repay handing out the work. And rows.
constexpr int64_t kGrain = 64;
constexpr int64_t kRowGrain = 16;

// work(first, last) over ranges that tile the rows.
template <typename Work>
void over_rows(int64_t rows, const Work& work) {
  at::parallel_for(0, rows, kRowGrain, work);
}

// All rows as the kernel reads them: where they lie, or in `to`, as many times prepared_width floats.
template <typename T>
const float* prepare_rows(const cpu::Rows<T>& rows, float* to) {
  if (cpu::lies_prepared(rows)) return reinterpret_cast<const float*>(rows.data);
  over_rows(rows.count, [&](int64_t first, int64_t last) { cpu::prepare(cpu::best_isa(), rows, first, last, to); });
  return to;
}

// `input` [..., width] as the kernel reads it, [rows, prepared width]; it may share the memory.
template <typename T>
at::Tensor prepare_rows(const at::Tensor& input) {
  const int64_t width = input.size(-1);
  const at::Tensor dense = input.dim() == 2 && input.stride(1) == 1 ? input : input.contiguous();
  const int64_t rows = c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
  const int64_t stride = dense.dim() == 2 ? dense.stride(0) : width;
  const cpu::Rows<T> from{static_cast<const T*>(dense.const_data_ptr()), stride, rows, width};
  if (cpu::lies_prepared(from)) return dense.view({rows, width});
  at::Tensor prepared = at::empty({rows, cpu::prepared_width(width)}, input.options().dtype(at::kFloat));
  prepare_rows(from, prepared.data_ptr<float>());
  return prepared;
}

// [..., outputs] for an `input` [..., width].
inline at::Tensor empty_outputs(const at::Tensor& input, int64_t outputs) {
  c10::SmallVector<int64_t, 4> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = outputs;
  return at::empty(shape, input.options());
}

// Prepared rows times `weight` [outputs, width], whose last dimension is dense, to rows of `output`, `stride` apart.
template <typename T>
cpu::Linear<T> describe_linear(
    const float* prepared, int64_t rows, const at::Tensor& weight, const T* bias, T* output, int64_t stride) {
  return {
      .prepared = prepared,
      .weight = static_cast<const T*>(weight.const_data_ptr()),
      .bias = bias,
      .output = output,
      .rows = rows,
      .width = weight.size(1),
      .outputs = weight.size(0),
      .weight_stride = weight.stride(0),
      .output_stride = stride,
  };
}

// The same to the dense `output` [..., outputs or more].
template <typename T>
cpu::Linear<T> describe_linear(
    const at::Tensor& prepared, const at::Tensor& weight, const at::Tensor* bias, at::Tensor& output) {
  return describe_linear(
      prepared.const_data_ptr<float>(), prepared.size(0), weight,
      bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr, static_cast<T*>(output.mutable_data_ptr()),
      output.size(-1));
}

// Outputs rounded up to whole tiles of four.
inline int64_t whole_tiles(int64_t outputs) { return (outputs + 3) / 4 * 4; }

struct alignas(cpu::kLineBytes) Line {
  float values[cpu::kLineBytes / sizeof(float)];
};

// work(scratch, first, last) over ranges of outputs that tile them all.
template <typename Work>
void over_outputs(int64_t outputs, int64_t width, const Work& work) {
  at::parallel_for(0, whole_tiles(outputs) / 4, kGrain / 4, [&](int64_t first, int64_t last) {
    const std::unique_ptr<Line[]> scratch(new Line[cpu::scratch_size(width) * sizeof(float) / sizeof(Line)]);
    work(reinterpret_cast<float*>(scratch.get()), 4 * first, std::min(4 * last, outputs));
  });
}

// work(part, first, last) over parts of a linear: all its rows for outputs [first, last); or, of many rows in float32, those
// of whose weights and outputs a second-level cache holds 512 and 128 KiB until `work` is done with them.
template <typename T, typename Work>
void over_blocks(const cpu::Linear<T>& args, int64_t first, int64_t last, const Work& work) {
  constexpr int64_t weights = 512 << 10, most = 144;
  if (!std::is_same_v<T, float> || args.rows <= most) return work(args, first, last);
  const int64_t outputs = std::max<int64_t>(weights / (4 * std::max<int64_t>(args.width, 1)) / 4 * 4, 4);
  for (; first < last; first += outputs) {
    cpu::Linear<T> part = args;
    for (int64_t left = args.rows; left; left -= part.rows) {
      part.rows = std::min(left, most);
      work(part, first, std::min(first + outputs, last));
      part.prepared += part.rows * cpu::prepared_width(args.width);
      part.output += part.rows * args.output_stride;
    }
  }
}

inline at::Tensor dense_weight(const at::Tensor& weight) { return weight.stride(1) == 1 ? weight : weight.contiguous(); }

// Several linears over the same prepared rows, in one parallel region.
template <typename T>
void joint_linear_rows(c10::ArrayRef<cpu::Linear<T>> linears) {
  int64_t padded = 0;
  for (const cpu::Linear<T>& args : linears) padded += whole_tiles(args.outputs);
  over_outputs(padded, linears[0].width, [&](float* scratch, int64_t first, int64_t last) {
    int64_t start = 0;
    for (const cpu::Linear<T>& args : linears) {
      const int64_t from = std::max<int64_t>(first - start, 0), to = std::min(last - start, args.outputs);
      if (from < to) cpu::linear(cpu::best_isa(), args, scratch, from, to);
      start += whole_tiles(args.outputs);
    }
  });
}

// The same of tensors, their outputs side by side in rows of `output`, `stride` apart.
template <typename T>
void joint_linear_rows(
    const float* prepared, int64_t rows, at::TensorList weights, at::TensorList biases, T* output, int64_t stride) {
  c10::SmallVector<at::Tensor, 8> held;
  c10::SmallVector<cpu::Linear<T>, 4> linears;
  held.reserve(weights.size() + biases.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor& weight = held.emplace_back(dense_weight(weights[i]));
    const at::Tensor* bias = biases.empty() ? nullptr : &held.emplace_back(biases[i].contiguous());
    linears.push_back(
        describe_linear<T>(
            prepared, rows, weight, bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr, output, stride));
    output += weight.size(0);
  }
  joint_linear_rows<T>(linears);
}

}  // namespace firp
