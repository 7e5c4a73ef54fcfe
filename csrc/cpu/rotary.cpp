// firp::rotary on a CPU: checks and registration.
#include <torch/library.h>

#include "../checks/tensors.h"
#include "firp/cpu/row.h"

namespace firp {
namespace {

template <typename T>
void run(const at::Tensor& rows, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t count = rows.size(1), heads = rows.size(2), head_dim = rows.size(3);
  for (int64_t b = 0; b < rows.size(0); ++b) {
    for (int64_t r = 0; r < count; ++r) {
      const T* c = static_cast<const T*>(cos.const_data_ptr()) + (b * count + r) * head_dim;
      const T* s = static_cast<const T*>(sin.const_data_ptr()) + (b * count + r) * head_dim;
      for (int64_t h = 0; h < heads; ++h) {
        T* row = static_cast<T*>(rows.mutable_data_ptr()) + b * rows.stride(0) + r * rows.stride(1) + h * rows.stride(2);
        cpu::rotary(cpu::best_isa(), row, c, s, head_dim);
      }
    }
  }
}

void rotary(const at::Tensor& rows, const at::Tensor& cos, const at::Tensor& sin) {
  check_same_device({{"rows", rows}, {"cos", cos}, {"sin", sin}});
  check_shape("rows", rows, {kAny, kAny, kAny, kAny});
  const int64_t head_dim = rows.size(3);
  check_shape("cos", cos, {rows.size(0), rows.size(1), head_dim});
  check_shape("sin", sin, cos.sizes());
  check_few_row_dtype("rows", rows);
  check_dtype("cos", cos, rows.scalar_type());
  check_dtype("sin", sin, rows.scalar_type());
  TORCH_CHECK_VALUE(head_dim % 2 == 0, "rows: got head width ", head_dim, ", expected an even one");
  TORCH_CHECK_VALUE(rows.stride(3) == 1, "rows: got a strided last dimension, expected a dense one");
  const at::Tensor c = cos.contiguous(), s = sin.contiguous();
  rows.scalar_type() == at::kFloat ? run<float>(rows, c, s) : run<cpu::bfloat16>(rows, c, s);
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("rotary", rotary); }

}  // namespace firp
