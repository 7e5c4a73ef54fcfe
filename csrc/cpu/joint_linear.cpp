// firp::joint_linear on a CPU: several linears over the same rows in one parallel region. Checks and registration.
#include <torch/library.h>

#include <string>
#include <vector>

#include "../checks/tensors.h"
#include "linear_rows.h"

namespace firp {
namespace {

template <typename T>
void run(const at::Tensor& input, at::TensorList weights, at::TensorList biases, at::Tensor& output) {
  const at::Tensor prepared = prepare_rows<T>(input);
  std::vector<at::Tensor> held;
  held.reserve(weights.size() + biases.size());
  std::vector<cpu::Linear<T>> linears;
  linears.reserve(weights.size());
  int64_t column = 0, padded = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor& weight = held.emplace_back(dense_weight(weights[i]));
    const at::Tensor* bias = biases.empty() ? nullptr : &held.emplace_back(biases[i].contiguous());
    linears.push_back(describe_linear<T>(prepared, weight, bias, output));
    linears.back().output += column;
    column += linears.back().outputs;
    padded += whole_tiles(linears.back().outputs);
  }
  over_outputs(padded, input.size(-1), [&](float* scratch, int64_t first, int64_t last) {
    int64_t start = 0;
    for (const cpu::Linear<T>& args : linears) {
      const int64_t from = std::max<int64_t>(first - start, 0), to = std::min(last - start, args.outputs);
      if (from < to) cpu::linear(cpu::best_isa(), args, scratch, from, to);
      start += whole_tiles(args.outputs);
    }
  });
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
