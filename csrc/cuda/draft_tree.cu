// firp::draft_tree on CUDA: checks and registration. Values stay on the device and are not checked.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>

#include "../checks/draft_tree.h"
#include "firp/cuda/draft_tree.cuh"
#include "stream.h"

namespace firp {
namespace {

using at::Tensor;

DraftTensors draft_tree(
    const Tensor& probabilities, const Tensor& candidates, const Tensor& root_token, const Tensor& num_offsets,
    int64_t num_nodes, int64_t num_lookahead, const std::optional<Tensor>& order) {
  check_draft_tree(probabilities, candidates, root_token, num_offsets, num_nodes, num_lookahead, order);
  const c10::DeviceGuard guard(probabilities.device());
  const Tensor table = probabilities.contiguous(), ids = candidates.contiguous(), roots = root_token.contiguous();
  const Tensor usable = num_offsets.contiguous(), ordered = order ? order->contiguous() : Tensor();
  DraftTensors tree = new_draft_tree(probabilities, num_nodes, num_lookahead);
  auto& [tokens, parents, depths, ancestors, lookahead] = tree;
  const cuda::DraftTree args{
      .probabilities = table.const_data_ptr<float>(),
      .candidates = ids.const_data_ptr<int64_t>(),
      .order = order ? ordered.const_data_ptr<int32_t>() : nullptr,
      .root_token = roots.const_data_ptr<int64_t>(),
      .num_offsets = usable.const_data_ptr<int32_t>(),
      .tokens = tokens.data_ptr<int64_t>(),
      .parents = parents.data_ptr<int32_t>(),
      .depths = depths.data_ptr<int32_t>(),
      .ancestors = ancestors.data_ptr<int32_t>(),
      .lookahead = lookahead.data_ptr<int32_t>(),
      .k = static_cast<int32_t>(table.size(1)),
      .width = static_cast<int32_t>(ids.size(2)),
      .ranks = static_cast<int32_t>(table.size(-1)),
      .num_nodes = static_cast<int32_t>(num_nodes),
      .num_lookahead = static_cast<int32_t>(num_lookahead),
  };
  check_launch(cuda::draft_tree(args, probabilities.size(0), current_stream(probabilities)));
  return tree;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CUDA, library) { library.impl("draft_tree", draft_tree); }

}  // namespace firp
