// firp::linear on a CPU: checks, threads, registration.
#include "firp/cpu/linear.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "checks.h"

namespace firp {
namespace {

// Outputs a thread takes at a time: whole tiles of four, enough of them to repay handing out the work.
constexpr int64_t kGrain = 64;

template <typename T>
void run(const at::Tensor& input, const at::Tensor& weight, const at::Tensor* bias, at::Tensor& output) {
  const cpu::Isa isa = cpu::best_isa();
  const int64_t rows = input.size(0), width = input.size(1), outputs = weight.size(0);
  const at::Tensor prepared = at::empty({rows, cpu::prepared_width(width)}, at::kFloat);
  cpu::prepare(isa, static_cast<const T*>(input.const_data_ptr()), input.stride(0), rows, width, prepared.data_ptr<float>());
  const cpu::Linear<T> args{
      prepared.const_data_ptr<float>(),
      static_cast<const T*>(weight.const_data_ptr()),
      bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
      static_cast<T*>(output.mutable_data_ptr()),
      rows,
      width,
      outputs,
      weight.stride(0)};
  at::parallel_for(0, (outputs + 3) / 4, kGrain / 4, [&](int64_t first, int64_t last) {
    const at::Tensor scratch = at::empty({cpu::scratch_size(width)}, at::kFloat);
    cpu::linear(isa, args, scratch.data_ptr<float>(), 4 * first, std::min(4 * last, outputs));
  });
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  check_shape("weight", weight, {kAny, kAny});
  const int64_t width = weight.size(1);
  TORCH_CHECK_VALUE(
      input.dim() >= 1 && input.size(-1) == width, "input: got shape ", shape_text(input.sizes()),
      ", expected last dimension ", width);
  check_float("input", input);
  check_dtype("weight", weight, input.scalar_type());
  if (bias) {
    check_same_cpu({{"bias", *bias}});
    check_shape("bias", *bias, {weight.size(0)});
    check_dtype("bias", *bias, input.scalar_type());
  }
  check_same_cpu({{"input", input}, {"weight", weight}});
  const bool served = input.scalar_type() == at::kFloat || input.scalar_type() == at::kBFloat16;
  if (!served) return at::linear(input, weight, bias);

  at::Tensor flat = input.reshape({-1, width});
  if (flat.stride(1) != 1) flat = flat.contiguous();
  const at::Tensor dense = weight.stride(1) == 1 ? weight : weight.contiguous();
  const at::Tensor added = bias ? bias->contiguous() : at::Tensor();
  at::Tensor output = at::empty({flat.size(0), weight.size(0)}, input.options());
  if (input.scalar_type() == at::kFloat) {
    run<float>(flat, dense, bias ? &added : nullptr, output);
  } else {
    run<cpu::bfloat16>(flat, dense, bias ? &added : nullptr, output);
  }
  auto shape = input.sizes().vec();
  shape.back() = weight.size(0);
  return output.view(shape);
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("linear", linear); }

}  // namespace firp
