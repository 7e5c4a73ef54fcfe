// firp::gated_linear on a CPU: checks, threads, registration.
#include <torch/library.h>

#include "../checks/tensors.h"
#include "layer_rows.h"

namespace firp {
namespace {

template <typename T>
void run(const at::Tensor& input, const at::Tensor& gate, const at::Tensor& up, at::Tensor& output) {
  const at::Tensor prepared = prepare_rows<T>(input);
  at::Tensor other = at::empty(output.sizes(), output.options());
  const cpu::Linear<T> gates = describe_linear<T>(prepared, gate, nullptr, output);
  const cpu::Linear<T> ups = describe_linear<T>(prepared, up, nullptr, other);
  gated_linear_rows(gates, ups);
}

at::Tensor gated_linear(const at::Tensor& input, const at::Tensor& gate, const at::Tensor& up) {
  check_same_device({{"input", input}, {"gate", gate}, {"up", up}});
  check_shape("gate", gate, {kAny, kAny});
  check_shape("up", up, gate.sizes());
  check_last("input", input, gate.size(1));
  check_few_row_dtype("input", input);
  check_dtype("gate", gate, input.scalar_type());
  check_dtype("up", up, input.scalar_type());
  const at::Tensor dense_gate = dense_weight(gate), dense_up = dense_weight(up);
  at::Tensor output = empty_outputs(input, gate.size(0));
  if (input.scalar_type() == at::kFloat) {
    run<float>(input, dense_gate, dense_up, output);
  } else {
    run<cpu::bfloat16>(input, dense_gate, dense_up, output);
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("gated_linear", gated_linear); }

}  // namespace firp
