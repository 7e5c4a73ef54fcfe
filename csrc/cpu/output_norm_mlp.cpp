// firp::output_norm_mlp on a CPU: what a layer does after its attention, in one call. Checks, threads, registration.
#include <torch/library.h>

#include "../checks/tensors.h"
#include "layer_rows.h"

namespace firp {
namespace {

using at::Tensor;

struct Weights {
  Tensor output, bias, norm, gate, up, down;
  double eps;
};

// attended [rows, inputs] and residual [rows, width] are dense, and so are the last dimensions of all weights.
template <typename T>
void run(const Tensor& attended, const Tensor& residual, const Weights& weights, Tensor& out) {
  const cpu::Isa isa = cpu::best_isa();
  const int64_t rows = attended.size(0), inputs = attended.size(1), width = residual.size(1), wide = weights.gate.size(0);
  const int64_t widest = std::max({inputs, width, wide});
  const Tensor floats = at::empty({rows, cpu::prepared_width(widest)}, attended.options().dtype(at::kFloat));
  const Tensor numbers = at::empty({2 * rows, width + wide}, attended.options());
  float* prepared = floats.mutable_data_ptr<float>();
  T* hidden = static_cast<T*>(numbers.mutable_data_ptr());
  T* normed = hidden + rows * width;
  T* gates = normed + rows * width;
  T* ups = gates + rows * wide;
  T* result = static_cast<T*>(out.mutable_data_ptr());

  // input @ weight^T + bias + added.
  const auto add_linear = [&](const Tensor& weight, const Tensor* bias, const T* added, T* to) {
    const cpu::Linear<T> args = describe_linear<T>(prepared, rows, weight, bias, to, width);
    over_outputs(args.outputs, args.width, [&](float* scratch, int64_t first, int64_t last) {
      cpu::linear(isa, args, scratch, first, last);
      for (int64_t r = 0; r < rows; ++r) cpu::add(isa, to + r * width + first, added + r * width + first, last - first);
    });
  };

  prepare_rows(static_cast<const T*>(attended.const_data_ptr()), inputs, rows, inputs, prepared);
  add_linear(
      weights.output, weights.bias.defined() ? &weights.bias : nullptr, static_cast<const T*>(residual.const_data_ptr()),
      hidden);
  norm_rows(hidden, rows, weights.norm, weights.eps, normed, prepared);
  const cpu::Linear<T> gate = describe_linear<T>(prepared, rows, weights.gate, nullptr, gates, wide);
  const cpu::Linear<T> up = describe_linear<T>(prepared, rows, weights.up, nullptr, ups, wide);
  gated_linear_rows(gate, up);
  prepare_rows(gates, wide, rows, wide, prepared);
  add_linear(weights.down, nullptr, hidden, result);
}

Tensor output_norm_mlp(
    const Tensor& attended, const Tensor& residual, const Tensor& output, const std::optional<Tensor>& bias, const Tensor& norm,
    double eps, const Tensor& gate, const Tensor& up, const Tensor& down) {
  check_same_device(
      {{"attended", attended},
       {"residual", residual},
       {"output", output},
       {"bias", bias ? *bias : output},
       {"norm", norm},
       {"gate", gate},
       {"up", up},
       {"down", down}});
  check_shape("residual", residual, {kAny, kAny, kAny});
  const int64_t batch = residual.size(0), count = residual.size(1), width = residual.size(2);
  check_shape("attended", attended, {batch, count, kAny, kAny});
  const int64_t inputs = attended.size(2) * attended.size(3);
  check_shape("output", output, {width, inputs});
  if (bias) check_shape("bias", *bias, {width});
  check_shape("norm", norm, {width});
  check_shape("gate", gate, {kAny, width});
  check_shape("up", up, gate.sizes());
  check_shape("down", down, {width, gate.size(0)});
  check_few_row_dtype("attended", attended);
  for (const auto& [name, tensor] : {
           std::pair<const char*, const Tensor&>{"residual", residual},
           {"output", output},
           {"bias", bias ? *bias : output},
           {"norm", norm},
           {"gate", gate},
           {"up", up},
           {"down", down},
       }) {
    check_dtype(name, tensor, attended.scalar_type());
  }
  const Weights weights{
      .output = dense_weight(output),
      .bias = bias ? bias->contiguous() : Tensor(),
      .norm = norm.contiguous(),
      .gate = dense_weight(gate),
      .up = dense_weight(up),
      .down = dense_weight(down),
      .eps = eps,
  };
  Tensor out = at::empty({batch, count, width}, residual.options());
  const Tensor rows = attended.contiguous().view({batch * count, inputs});
  const Tensor added = residual.contiguous().view({batch * count, width});
  attended.scalar_type() == at::kFloat ? run<float>(rows, added, weights, out) : run<cpu::bfloat16>(rows, added, weights, out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("output_norm_mlp", output_norm_mlp); }

}  // namespace firp
