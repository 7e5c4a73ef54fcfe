// firp::joint_linear on a CPU: several linears over the same rows in one parallel region. Checks and registration.
#include <torch/library.h>

#include <string>

#include "../checks/tensors.h"
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
  TORCH_CHECK_VALUE(
      biases.empty() || biases.size() == weights.size(), "biases: got ", biases.size(), ", expected none or ", weights.size(),
      " (one per weight)");
  check_few_row_dtype("input", input);
  int64_t outputs = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    check_same_device({{"input", input}, {name.c_str(), weights[i]}});
    check_shape(name.c_str(), weights[i], {kAny, i ? weights[0].size(1) : kAny});
    check_dtype(name.c_str(), weights[i], input.scalar_type());
    outputs += weights[i].size(0);
  }
  for (size_t i = 0; i < biases.size(); ++i) {
    const std::string name = "biases[" + std::to_string(i) + "]";
    check_same_device({{"input", input}, {name.c_str(), biases[i]}});
    check_shape(name.c_str(), biases[i], {weights[i].size(0)});
    check_dtype(name.c_str(), biases[i], input.scalar_type());
  }
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
