// firp::linear on a CPU: checks, threads, registration.
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "../checks/tensors.h"
#include "linear_rows.h"

namespace firp {

template void cpu::prepare(cpu::Isa, const cpu::Rows<float>&, int64_t, int64_t, float*);
template void cpu::prepare(cpu::Isa, const cpu::Rows<cpu::bfloat16>&, int64_t, int64_t, float*);
template void cpu::linear(cpu::Isa, const cpu::Linear<float>&, float*, int64_t, int64_t);
template void cpu::linear(cpu::Isa, const cpu::Linear<cpu::bfloat16>&, float*, int64_t, int64_t);

namespace {

template <typename T>
void run(const at::Tensor& input, const at::Tensor& weight, const at::Tensor* bias, at::Tensor& output) {
  const at::Tensor prepared = prepare_rows<T>(input);
  const cpu::Linear<T> args = describe_linear<T>(prepared, weight, bias, output);
  over_outputs(args.outputs, args.width, [&](float* scratch, int64_t first, int64_t last) {
    cpu::linear(cpu::best_isa(), args, scratch, first, last);
  });
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_same_device({{"input", input}, {"weight", weight}, {"bias", bias ? *bias : input}});
  check_shape("weight", weight, {kAny, kAny});
  const int64_t width = weight.size(1);
  check_last("input", input, width);
  check_float("input", input);
  check_dtype("weight", weight, input.scalar_type());
  if (bias) {
    check_shape("bias", *bias, {weight.size(0)});
    check_dtype("bias", *bias, input.scalar_type());
  }
  const bool has_kernel = input.scalar_type() == at::kFloat || input.scalar_type() == at::kBFloat16;
  if (!has_kernel) return at::linear(input, weight, bias);

  const at::Tensor dense = dense_weight(weight);
  const at::Tensor added = bias ? bias->contiguous() : at::Tensor();
  at::Tensor output = empty_outputs(input, weight.size(0));
  if (input.scalar_type() == at::kFloat) {
    run<float>(input, dense, bias ? &added : nullptr, output);
  } else {
    run<cpu::bfloat16>(input, dense, bias ? &added : nullptr, output);
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("linear", linear); }

}  // namespace firp
