// firp::rms_norm on a CPU: checks and registration.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks/tensors.h"
#include "firp/cpu/row.h"

namespace firp {
namespace {

template <typename T>
void run(const at::Tensor& input, const at::Tensor& weight, double eps, at::Tensor& output) {
  const int64_t width = weight.size(0), rows = width ? input.numel() / width : 0;
  const T* from = static_cast<const T*>(input.const_data_ptr());
  T* to = static_cast<T*>(output.mutable_data_ptr());
  for (int64_t r = 0; r < rows; ++r, from += width, to += width) {
    cpu::rms_norm(cpu::best_isa(), from, static_cast<const T*>(weight.const_data_ptr()), width, static_cast<float>(eps), to);
  }
}

at::Tensor rms_norm(const at::Tensor& input, const at::Tensor& weight, double eps) {
  check_same_device({{"input", input}, {"weight", weight}});
  check_shape("weight", weight, {kAny});
  check_last("input", input, weight.size(0));
  check_few_row_dtype("input", input);
  check_dtype("weight", weight, input.scalar_type());
  const at::Tensor rows = input.contiguous(), scales = weight.contiguous();
  at::Tensor output = at::empty(input.sizes(), input.options());
  input.scalar_type() == at::kFloat ? run<float>(rows, scales, eps, output) : run<cpu::bfloat16>(rows, scales, eps, output);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("rms_norm", rms_norm); }

}  // namespace firp
