// Checks of several weights over the same rows, with their biases.
#pragma once

#include <string>

#include "tensors.h"

namespace firp {

// Weights [*, width] with no biases or one each, of the input's dtype and device.
inline void check_joint_linear(const at::Tensor& input, at::TensorList weights, at::TensorList biases, int64_t width) {
  TORCH_CHECK_VALUE(
      biases.empty() || biases.size() == weights.size(), "biases: got ", biases.size(), ", expected none or ", weights.size(),
      " (one per weight)");
  const auto check_part = [&](const char* list, size_t i, const at::Tensor& part, at::IntArrayRef shape) {
    const std::string name = list + ("[" + std::to_string(i) + "]");
    check_same_device({{"input", input}, {name.c_str(), part}});
    check_shape(name.c_str(), part, shape);
    check_dtype(name.c_str(), part, input.scalar_type());
  };
  for (size_t i = 0; i < weights.size(); ++i) check_part("weights", i, weights[i], {kAny, width});
  for (size_t i = 0; i < biases.size(); ++i) check_part("biases", i, biases[i], {weights[i].size(0)});
}

}  // namespace firp
