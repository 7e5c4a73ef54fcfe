// firp::predictor_projection on a CPU: one pass of the few-row linear over all k maps. Checks and registration.
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "../checks/tensors.h"
#include "firp/cpu/checks.h"
#include "linear_rows.h"

namespace firp {
namespace {

template <typename T>
void run(const at::Tensor& sources, const at::Tensor& maps, at::Tensor& output) {
  const at::Tensor prepared = prepare_rows<T>(sources);
  const cpu::Linear<T> args = describe_linear<T>(prepared, maps, nullptr, output);
  over_outputs(args.outputs, args.width, [&](float* scratch, int64_t first, int64_t last) {
    cpu::linear(cpu::best_isa(), args, scratch, first, last);
  });
}

at::Tensor predictor_projection(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& lookahead) {
  check_same_device({{"hidden", hidden}, {"weight", weight}, {"lookahead", lookahead}});
  check_shape("hidden", hidden, {kAny, kAny, kAny});
  const int64_t batch = hidden.size(0), num_nodes = hidden.size(1), width = hidden.size(2);
  check_shape("weight", weight, {kAny, width, width});
  check_shape("lookahead", lookahead, {batch, kAny});
  check_float("hidden", hidden);
  check_dtype("weight", weight, hidden.scalar_type());
  check_dtype("lookahead", lookahead, at::kInt);
  const at::Tensor nodes = lookahead.contiguous();
  check_values(cpu::check_lookahead(nodes.const_data_ptr<int32_t>(), nodes.numel(), num_nodes));
  const int64_t slots = lookahead.size(1), k = weight.size(0);
  const at::Tensor empty = nodes.lt(0);
  const at::Tensor index = nodes.clamp_min(0).to(at::kLong).unsqueeze(-1).expand({batch, slots, width});
  const at::Tensor sources = hidden.gather(1, index).view({batch * slots, width});
  const at::Tensor maps = weight.reshape({k * width, width});
  at::Tensor pseudo;
  if (hidden.scalar_type() == at::kFloat || hidden.scalar_type() == at::kBFloat16) {
    pseudo = at::empty({batch * slots, k * width}, hidden.options());
    hidden.scalar_type() == at::kFloat ? run<float>(sources, maps, pseudo) : run<cpu::bfloat16>(sources, maps, pseudo);
  } else {
    pseudo = at::linear(sources, maps);
  }
  pseudo = pseudo.view({batch, slots, k * width}).masked_fill(empty.unsqueeze(-1), 0);
  return at::cat({hidden, pseudo.view({batch, slots * k, width})}, 1);
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("predictor_projection", predictor_projection); }

}  // namespace firp
