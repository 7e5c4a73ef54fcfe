// firp::update_states on a CPU: checks, threads, registration.
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "../checks/tensors.h"
#include "linear_rows.h"

namespace firp {
namespace {

using at::Tensor;

constexpr float kEpsilon = 1e-6f;

struct Weights {
  Tensor inputs, bias, outputs;
};

// to = row / sqrt(mean(row^2) + epsilon); returns sqrt(mean(row^2)).
template <typename T>
float unit_row(const T* row, int64_t width, T* to) {
  float total = 0;
  for (int64_t i = 0; i < width; ++i) total += cpu::to_float(row[i]) * cpu::to_float(row[i]);
  const float mean = total / static_cast<float>(width), factor = 1.0f / std::sqrt(mean + kEpsilon);
  for (int64_t i = 0; i < width; ++i) cpu::store(cpu::to_float(row[i]) * factor, to + i);
  return std::sqrt(mean);
}

// Dense rows [offsets, batch, width] as the kernel reads them, each offset's for itself: where they lie, or in `to`.
template <typename T>
const float* prepare_offsets(const T* from, int64_t offsets, int64_t batch, int64_t width, float* to) {
  const int64_t rows = batch * width, apart = batch * cpu::prepared_width(width);
  const float* first = prepare_rows(cpu::Rows<T>{from, width, batch, width}, to);
  for (int64_t j = 1; j < offsets; ++j) prepare_rows(cpu::Rows<T>{from + j * rows, width, batch, width}, to + j * apart);
  return first;
}

// work(linear of an offset, first, last) over ranges that tile the outputs of all offsets, in one parallel region.
// An offset has `rows` rows of what prepare_offsets made, and its outputs begin at to(offset), `stride` apart.
template <typename T, typename To, typename Work>
void over_offsets(
    const float* prepared, int64_t rows, const Tensor& weights, const Tensor* bias, int64_t stride, To to, Work work) {
  const int64_t offsets = weights.size(0), outputs = weights.size(1), width = weights.size(2), padded = whole_tiles(outputs);
  over_outputs(offsets * padded, width, [&](float* scratch, int64_t first, int64_t last) {
    for (int64_t j = 0; j < offsets; ++j) {
      const int64_t from = std::max<int64_t>(first - j * padded, 0), end = std::min(last - j * padded, outputs);
      if (from >= end) continue;
      const cpu::Linear<T> args{
          .prepared = prepared + j * rows * cpu::prepared_width(width),
          .weight = static_cast<const T*>(weights.const_data_ptr()) + j * outputs * width,
          .bias = bias ? static_cast<const T*>(bias->const_data_ptr()) + j * outputs : nullptr,
          .output = to(j),
          .rows = rows,
          .width = width,
          .outputs = outputs,
          .weight_stride = width,
          .output_stride = stride,
      };
      cpu::linear(cpu::best_isa(), args, scratch, from, end);
      work(j, from, end);
    }
  });
}

template <typename T>
void run(const Tensor& states, const Tensor& first, const Weights& weights, Tensor& out) {
  const int64_t batch = states.size(0), offsets = states.size(1), width = states.size(2), inner = weights.inputs.size(1);
  const T* from = static_cast<const T*>(states.const_data_ptr());
  const T* known = static_cast<const T*>(first.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const int64_t rows = offsets * batch, widest = std::max(2 * width, inner);
  const Tensor joined = at::empty({rows, 2 * width + inner}, states.options());
  const Tensor floats = at::empty({rows, cpu::prepared_width(widest)}, states.options().dtype(at::kFloat));
  T* units = static_cast<T*>(joined.mutable_data_ptr());
  T* hidden = units + rows * 2 * width;
  float* memory = floats.mutable_data_ptr<float>();
  std::vector<float> sizes(rows);
  for (int64_t j = 0; j < offsets; ++j) {
    for (int64_t b = 0; b < batch; ++b) {
      T* row = units + (j * batch + b) * 2 * width;
      sizes[j * batch + b] = unit_row(from + (b * offsets + j) * width, width, row);
      unit_row(known + b * width, width, row + width);
    }
  }
  over_offsets<T>(
      prepare_offsets(units, offsets, batch, 2 * width, memory), batch, weights.inputs, &weights.bias, inner,
      [&](int64_t j) { return hidden + j * batch * inner; },
      [&](int64_t j, int64_t begin, int64_t end) {
        for (int64_t b = 0; b < batch; ++b) {
          T* row = hidden + (j * batch + b) * inner;
          for (int64_t i = begin; i < end; ++i) {
            const float value = cpu::to_float(row[i]);
            cpu::store(value / (1.0f + std::exp(-value)), row + i);
          }
        }
      });
  over_offsets<T>(
      prepare_offsets(hidden, offsets, batch, inner, memory), batch, weights.outputs, nullptr, offsets * width,
      [&](int64_t j) { return to + j * width; },
      [&](int64_t j, int64_t begin, int64_t end) {
        for (int64_t b = 0; b < batch; ++b) {
          const int64_t row = (b * offsets + j) * width;
          const float size = sizes[j * batch + b];
          for (int64_t i = row + begin; i < row + end; ++i) {
            cpu::store(cpu::to_float(from[i]) + size * cpu::to_float(to[i]), to + i);
          }
        }
      });
}

Tensor update_states(
    const Tensor& states, const Tensor& first, const Tensor& inputs, const Tensor& bias, const Tensor& outputs) {
  check_same_device({{"states", states}, {"first", first}, {"inputs", inputs}, {"bias", bias}, {"outputs", outputs}});
  check_shape("states", states, {kAny, kAny, kAny});
  const int64_t batch = states.size(0), offsets = states.size(1), width = states.size(2);
  check_shape("first", first, {batch, width});
  check_shape("inputs", inputs, {offsets, kAny, 2 * width});
  check_shape("bias", bias, {offsets, inputs.size(1)});
  check_shape("outputs", outputs, {offsets, width, inputs.size(1)});
  check_few_row_dtype("states", states);
  for (const auto& [name, tensor] : {
           std::pair<const char*, const Tensor&>{"first", first},
           {"inputs", inputs},
           {"bias", bias},
           {"outputs", outputs},
       }) {
    check_dtype(name, tensor, states.scalar_type());
  }
  const Weights weights{.inputs = inputs.contiguous(), .bias = bias.contiguous(), .outputs = outputs.contiguous()};
  const Tensor rows = states.contiguous(), known = first.contiguous();
  Tensor out = at::empty(states.sizes(), states.options());
  if (!out.numel()) return out;
  states.scalar_type() == at::kFloat ? run<float>(rows, known, weights, out) : run<cpu::bfloat16>(rows, known, weights, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("update_states", update_states); }

}  // namespace firp
