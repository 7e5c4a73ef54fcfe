// firp::verify_tree on a CPU: checks and registration.
#include "firp/cpu/verify_tree.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../checks/tensors.h"
#include "firp/cpu/checks.h"

namespace firp {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> verify_tree(
    const Tensor& scores, const std::optional<Tensor>& uniforms, const Tensor& tokens, const Tensor& parents,
    const Tensor& lookahead, int64_t max_depth) {
  check_same_device(
      {{"scores", scores},
       {"uniforms", uniforms ? *uniforms : scores},
       {"tokens", tokens},
       {"parents", parents},
       {"lookahead", lookahead}});
  check_shape("scores", scores, {kAny, kAny, kAny});
  const int64_t batch = scores.size(0), num_nodes = scores.size(1), vocab = scores.size(2);
  TORCH_CHECK_VALUE(
      num_nodes >= 1 && vocab >= 1, "scores: got shape ", shape_text(scores.sizes()), ", expected at least one node and token");
  TORCH_CHECK_VALUE(max_depth >= 0, "max_depth: got ", max_depth, ", expected at least 0");
  if (uniforms) {
    check_shape("uniforms", *uniforms, {batch, max_depth + 1});
    check_dtype("uniforms", *uniforms, at::kFloat);
  }
  check_shape("tokens", tokens, {batch, num_nodes});
  check_shape("parents", parents, {batch, num_nodes});
  check_shape("lookahead", lookahead, {batch, kAny});
  check_float("scores", scores);
  check_dtype("tokens", tokens, at::kLong);
  check_dtype("parents", parents, at::kInt);
  check_dtype("lookahead", lookahead, at::kInt);
  const Tensor dense = scores.contiguous(), ids = tokens.contiguous(), links = parents.contiguous(),
               nodes = lookahead.contiguous();
  const Tensor drawn = uniforms ? uniforms->contiguous() : Tensor();
  check_values(cpu::check_lookahead(nodes.const_data_ptr<int32_t>(), nodes.numel(), num_nodes));
  for (int64_t b = 0; b < batch; ++b)
    check_values(cpu::check_parents(links.const_data_ptr<int32_t>() + b * num_nodes, num_nodes));

  const auto options = scores.options().dtype(at::kInt);
  Tensor path = at::empty({batch, max_depth + 1}, options), bonus = at::empty({batch}, options.dtype(at::kLong));
  Tensor num_accepted = at::empty({batch}, options), last_slot = at::empty({batch}, options);
  Tensor levels_up = at::empty({batch}, options), status = at::empty({batch}, options);
  const int64_t slots = lookahead.size(1);
  const auto go = [&](auto number) {
    using T = decltype(number);
    for (int64_t b = 0; b < batch; ++b) {
      cpu::Verified out{.path = path.data_ptr<int32_t>() + b * (max_depth + 1)};
      cpu::verify_tree(
          static_cast<const T*>(dense.const_data_ptr()) + b * num_nodes * vocab,
          uniforms ? drawn.const_data_ptr<float>() + b * (max_depth + 1) : nullptr,
          ids.const_data_ptr<int64_t>() + b * num_nodes, links.const_data_ptr<int32_t>() + b * num_nodes,
          nodes.const_data_ptr<int32_t>() + b * slots, num_nodes, vocab, slots, max_depth, out);
      num_accepted.data_ptr<int32_t>()[b] = out.num_accepted;
      bonus.data_ptr<int64_t>()[b] = out.bonus;
      last_slot.data_ptr<int32_t>()[b] = out.last_slot;
      levels_up.data_ptr<int32_t>()[b] = out.levels_up;
      status.data_ptr<int32_t>()[b] = out.status;
    }
  };
  switch (scores.scalar_type()) {
    case at::kFloat: go(float{}); break;
    case at::kBFloat16: go(cpu::bfloat16{}); break;
    case at::kHalf: go(cpu::float16{}); break;
    default: go(double{}); break;
  }
  return {path, num_accepted, bonus, last_slot, levels_up, status};
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("verify_tree", verify_tree); }

}  // namespace firp
