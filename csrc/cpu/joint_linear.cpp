// firp::joint_linear on a CPU: several linears over the same rows in one parallel region. Checks and registration.
#include "../checks/joint_linear.h"

#include <torch/library.h>

#include "linear_rows.h"

namespace firp {
namespace {

template <typename T>
void run(const at::Tensor& input, at::TensorList weights, at::TensorList biases, at::Tensor& output) {
  const at::Tensor prepared = prepare_rows<T>(input);
  joint_linear_rows(
      prepared.const_data_ptr<float>(), prepared.size(0), weights, biases, static_cast<T*>(output.mutable_data_ptr()),
      output.size(-1));
}

at::Tensor joint_linear(const at::Tensor& input, at::TensorList weights, at::TensorList biases) {
  TORCH_CHECK_VALUE(!weights.empty(), "weights: got none, expected at least one");
  check_shape("weights[0]", weights[0], {kAny, kAny});
  check_few_row_dtype("input", input);
  check_joint_linear(input, weights, biases, weights[0].size(1));
  int64_t outputs = 0;
  for (const at::Tensor& weight : weights) outputs += weight.size(0);
  check_last("input", input, weights[0].size(1));
  at::Tensor output = empty_outputs(input, outputs);
  if (input.scalar_type() == at::kFloat) {
    run<float>(input, weights, biases, output);
  } else {
    run<cpu::bfloat16>(input, weights, biases, output);
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("joint_linear", joint_linear); }

}  // namespace firp
