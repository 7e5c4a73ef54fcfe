// firp::draft_tree on a CPU: checks and registration.
#include "firp/cpu/draft_tree.h"

#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "../checks/draft_tree.h"

namespace firp {
namespace {

using at::Tensor;

DraftTensors draft_tree(
    const Tensor& probabilities, const Tensor& candidates, const Tensor& root_token, const Tensor& num_offsets,
    int64_t num_nodes, int64_t num_lookahead, const std::optional<Tensor>& order) {
  check_draft_tree(probabilities, candidates, root_token, num_offsets, num_nodes, num_lookahead, order);
  const int64_t batch = probabilities.size(0), k = probabilities.size(1), ranks = probabilities.size(-1);
  const int64_t width = candidates.size(2), entries = probabilities.numel() / std::max<int64_t>(batch, 1);
  const Tensor table = probabilities.contiguous(), ids = candidates.contiguous(), roots = root_token.contiguous();
  const Tensor usable = num_offsets.contiguous(), ordered = order ? order->contiguous() : Tensor();
  const int32_t* places = order ? ordered.const_data_ptr<int32_t>() : nullptr;
  for (int64_t b = 0; b < batch; ++b) {
    check_values(cpu::check_between("num_offsets", usable.const_data_ptr<int32_t>()[b], 0, k));
  }
  for (int64_t i = 0; places && i < ordered.numel(); ++i) check_values(cpu::check_between("order", places[i], 0, width - 1));

  const int64_t words = (num_nodes + 31) / 32;
  DraftTensors tree = new_draft_tree(probabilities, num_nodes, num_lookahead);
  auto& [tokens, parents, depths, ancestors, lookahead] = tree;
  for (int64_t b = 0; b < batch; ++b) {
    const cpu::DraftTree out{
        .tokens = tokens.data_ptr<int64_t>() + b * num_nodes,
        .parents = parents.data_ptr<int32_t>() + b * num_nodes,
        .depths = depths.data_ptr<int32_t>() + b * num_nodes,
        .ancestors = ancestors.data_ptr<int32_t>() + b * num_nodes * words,
        .lookahead = lookahead.data_ptr<int32_t>() + b * num_lookahead,
    };
    const cpu::Marginals marginals{
        .probabilities = table.const_data_ptr<float>() + b * entries,
        .candidates = ids.const_data_ptr<int64_t>() + b * k * width,
        .order = places ? places + b * entries : nullptr,
        .width = width,
        .ranks = ranks,
    };
    cpu::draft_tree(
        marginals, roots.const_data_ptr<int64_t>()[b], usable.const_data_ptr<int32_t>()[b], num_nodes, num_lookahead, out);
  }
  return tree;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("draft_tree", draft_tree); }

}  // namespace firp
