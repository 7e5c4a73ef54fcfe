// firp::add_rms_norm on a CPU: checks and registration.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../checks/tensors.h"
#include "firp/cpu/row.h"

namespace firp {
namespace {

template <typename T>
void run(
    const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& weight, double eps, at::Tensor& sum,
    at::Tensor& output) {
  const int64_t width = weight.size(0), rows = width ? hidden.numel() / width : 0;
  const cpu::Isa isa = cpu::best_isa();
  const T* added = static_cast<const T*>(hidden.const_data_ptr());
  const T* base = static_cast<const T*>(residual.const_data_ptr());
  const T* scales = static_cast<const T*>(weight.const_data_ptr());
  T* total = static_cast<T*>(sum.mutable_data_ptr());
  T* to = static_cast<T*>(output.mutable_data_ptr());
  for (int64_t r = 0; r < rows; ++r, added += width, base += width, total += width, to += width) {
    cpu::add(isa, added, base, width, total);
    cpu::rms_norm(isa, total, scales, width, static_cast<float>(eps), to);
  }
}

std::tuple<at::Tensor, at::Tensor> add_rms_norm(
    const at::Tensor& hidden, const at::Tensor& residual, const at::Tensor& weight, double eps) {
  check_same_device({{"hidden", hidden}, {"residual", residual}, {"weight", weight}});
  check_shape("weight", weight, {kAny});
  check_last("hidden", hidden, weight.size(0));
  check_shape("residual", residual, hidden.sizes());
  check_few_row_dtype("hidden", hidden);
  check_dtype("residual", residual, hidden.scalar_type());
  check_dtype("weight", weight, hidden.scalar_type());
  const at::Tensor rows = hidden.contiguous(), others = residual.contiguous(), scales = weight.contiguous();
  at::Tensor sum = at::empty(hidden.sizes(), hidden.options()), output = at::empty(hidden.sizes(), hidden.options());
  if (hidden.scalar_type() == at::kFloat) {
    run<float>(rows, others, scales, eps, sum, output);
  } else {
    run<cpu::bfloat16>(rows, others, scales, eps, sum, output);
  }
  return {sum, output};
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("add_rms_norm", add_rms_norm); }

}  // namespace firp
