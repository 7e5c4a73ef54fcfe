// firp::draft_tree on a CPU: checks and registration.
#include "firp/cpu/draft_tree.h"

#include <torch/library.h>

#include "../checks/draft_tree.h"

namespace firp {
namespace {

using at::Tensor;

DraftTensors draft_tree(
    const Tensor& probabilities, const Tensor& candidates, const Tensor& root_token, const Tensor& num_offsets,
    int64_t num_nodes, int64_t num_lookahead) {
  check_draft_tree(probabilities, candidates, root_token, num_offsets, num_nodes, num_lookahead);
  const int64_t batch = probabilities.size(0), k = probabilities.size(1), ranks = probabilities.size(2);
  const Tensor table = probabilities.contiguous(), ids = candidates.contiguous(), roots = root_token.contiguous();
  const Tensor usable = num_offsets.contiguous();
  for (int64_t b = 0; b < batch; ++b) {
    check_values(cpu::check_between("num_offsets", usable.const_data_ptr<int32_t>()[b], 0, k));
  }

  const int64_t words = (num_nodes + 31) / 32;
  DraftTensors tree = new_draft_tree(probabilities, num_nodes, num_lookahead);
  auto& [tokens, parents, depths, ancestors, lookahead] = tree;
  for (int64_t b = 0; b < batch; ++b) {
    const cpu::DraftTree out{
        tokens.data_ptr<int64_t>() + b * num_nodes, parents.data_ptr<int32_t>() + b * num_nodes,
        depths.data_ptr<int32_t>() + b * num_nodes, ancestors.data_ptr<int32_t>() + b * num_nodes * words,
        lookahead.data_ptr<int32_t>() + b * num_lookahead};
    cpu::draft_tree(
        table.const_data_ptr<float>() + b * k * ranks, ids.const_data_ptr<int64_t>() + b * k * ranks, ranks,
        roots.const_data_ptr<int64_t>()[b], usable.const_data_ptr<int32_t>()[b], num_nodes, num_lookahead, out);
  }
  return tree;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("draft_tree", draft_tree); }

}  // namespace firp
