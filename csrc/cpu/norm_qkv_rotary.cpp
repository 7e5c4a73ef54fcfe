// firp::norm_qkv_rotary on a CPU: what a layer does before its attention, in one call. Checks, threads, registration.
#include <torch/library.h>

#include "../checks/joint_linear.h"
#include "layer_rows.h"

namespace firp {
namespace {

using at::Tensor;

// The first `rotated` heads are queries and keys; input, norm, cos and sin are dense.
template <typename T>
void run(
    const Tensor& input, const Tensor& norm, double eps, at::TensorList weights, at::TensorList biases, const Tensor& cos,
    const Tensor& sin, int64_t rotated, Tensor& output) {
  const int64_t rows = input.size(0) * input.size(1), width = input.size(2);
  const int64_t head_dim = output.size(3), stride = output.size(2) * head_dim;
  const Tensor normed = at::empty(input.sizes(), input.options());
  const Tensor prepared = at::empty({rows, cpu::prepared_width(width)}, input.options().dtype(at::kFloat));
  T* heads = static_cast<T*>(output.mutable_data_ptr());
  const float* floats = norm_rows(
      static_cast<const T*>(input.const_data_ptr()), rows, static_cast<const T*>(norm.const_data_ptr()), width, eps,
      static_cast<T*>(normed.mutable_data_ptr()), prepared.mutable_data_ptr<float>());
  joint_linear_rows(floats, rows, weights, biases, heads, stride);
  rotate_rows(
      heads, stride, rows, rotated, static_cast<const T*>(cos.const_data_ptr()), static_cast<const T*>(sin.const_data_ptr()),
      head_dim);
}

Tensor norm_qkv_rotary(
    const Tensor& input, const Tensor& norm, double eps, at::TensorList weights, at::TensorList biases, const Tensor& cos,
    const Tensor& sin) {
  TORCH_CHECK_VALUE(weights.size() == 3, "weights: got ", weights.size(), ", expected 3 (queries, keys, values)");
  check_same_device({{"input", input}, {"norm", norm}, {"cos", cos}, {"sin", sin}});
  check_shape("norm", norm, {kAny});
  const int64_t width = norm.size(0);
  check_shape("input", input, {kAny, kAny, width});
  check_few_row_dtype("input", input);
  check_dtype("norm", norm, input.scalar_type());
  check_shape("cos", cos, {input.size(0), input.size(1), kAny});
  check_shape("sin", sin, cos.sizes());
  check_dtype("cos", cos, input.scalar_type());
  check_dtype("sin", sin, input.scalar_type());
  const int64_t head_dim = cos.size(2);
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim % 2 == 0, "cos: got head_dim ", head_dim, ", expected an even one");
  check_joint_linear(input, weights, biases, width);
  int64_t heads = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t outputs = weights[i].size(0);
    TORCH_CHECK_VALUE(
        outputs % head_dim == 0, "weights[", i, "]: got ", outputs, " outputs, expected a multiple of head_dim ", head_dim);
    heads += outputs / head_dim;
  }
  Tensor output = at::empty({input.size(0), input.size(1), heads, head_dim}, input.options());
  const auto go = [&](auto number) {
    const int64_t rotated = heads - weights[2].size(0) / head_dim;
    run<decltype(number)>(
        input.contiguous(), norm.contiguous(), eps, weights, biases, cos.contiguous(), sin.contiguous(), rotated, output);
  };
  input.scalar_type() == at::kFloat ? go(float{}) : go(cpu::bfloat16{});
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("norm_qkv_rotary", norm_qkv_rotary); }

}  // namespace firp
