// firp::output_norm_mlp on a CPU: what a layer does after its attention, in one call. Checks, threads, registration.
#include <torch/library.h>

#include "../checks/tensors.h"
#include "layer_rows.h"

namespace firp {
namespace {

using at::Tensor;

// attended [rows, inputs] and residual [rows, width] are dense.
template <typename T>
void run(const Tensor& attended, const Tensor& residual, const LayerEnd<T>& weights, Tensor& out) {
  const int64_t rows = attended.size(0);
  const Tensor floats = at::empty({weights.floats(rows)}, attended.options().dtype(at::kFloat));
  const Tensor scratch = at::empty({weights.scratch(rows)}, attended.options());
  layer_end_rows(
      weights, static_cast<const T*>(attended.const_data_ptr()), static_cast<const T*>(residual.const_data_ptr()), rows,
      static_cast<T*>(scratch.mutable_data_ptr()), floats.mutable_data_ptr<float>(), static_cast<T*>(out.mutable_data_ptr()));
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
  const Tensor first = dense_weight(output), gates = dense_weight(gate), ups = dense_weight(up), last = dense_weight(down);
  const Tensor offsets = bias ? bias->contiguous() : Tensor(), scales = norm.contiguous();
  Tensor out = at::empty({batch, count, width}, residual.options());
  const Tensor rows = attended.contiguous().view({batch * count, inputs});
  const Tensor added = residual.contiguous().view({batch * count, width});
  const auto go = [&](auto number) {
    using T = decltype(number);
    const LayerEnd<T> weights{
        .output = first,
        .gate = gates,
        .up = ups,
        .down = last,
        .bias = bias ? static_cast<const T*>(offsets.const_data_ptr()) : nullptr,
        .norm = static_cast<const T*>(scales.const_data_ptr()),
        .eps = eps,
    };
    run<T>(rows, added, weights, out);
  };
  attended.scalar_type() == at::kFloat ? go(float{}) : go(cpu::bfloat16{});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("output_norm_mlp", output_norm_mlp); }

}  // namespace firp
