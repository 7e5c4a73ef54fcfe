// Checks of several weights over the same rows, with their biases.
#pragma once

#include "tensors.h"

namespace firp {

// Weights [*, width] with no biases or one each, of the input's dtype and device.
inline void check_joint_linear(const at::Tensor& input, at::TensorList weights, at::TensorList biases, int64_t width) {
  TORCH_CHECK_VALUE(
      biases.empty() || biases.size() == weights.size(), "biases: got ", biases.size(), ", expected none or ", weights.size(),
      " (one per weight)");
  for (size_t i = 0; i < weights.size(); ++i)
    check_part({"weights", static_cast<int64_t>(i)}, weights[i], {kAny, width}, input);
  for (size_t i = 0; i < biases.size(); ++i)
    check_part({"biases", static_cast<int64_t>(i)}, biases[i], {weights[i].size(0)}, input);
}

}  // namespace firp
