// firp::draft_tree on a CPU: checks and registration.
#include "firp/cpu/draft_tree.h"

#include <torch/library.h>

#include <tuple>

#include "checks.h"

namespace firp {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> draft_tree(
    const Tensor& probabilities, const Tensor& candidates, const Tensor& root_token, const Tensor& num_offsets,
    int64_t num_nodes, int64_t num_lookahead) {
  check_same_cpu({{"probabilities", probabilities}, {"candidates", candidates}, {"root_token", root_token}, {"num_offsets", num_offsets}});
  check_shape("probabilities", probabilities, {kAny, kAny, kAny});
  const int64_t batch = probabilities.size(0), k = probabilities.size(1), ranks = probabilities.size(2);
  TORCH_CHECK_VALUE(
      k >= 1 && ranks >= 1, "probabilities: got ", k, " offsets and ", ranks, " ranks, expected at least one of each");
  check_shape("candidates", candidates, {batch, k, ranks});
  check_shape("root_token", root_token, {batch});
  check_shape("num_offsets", num_offsets, {batch});
  check_dtype("probabilities", probabilities, at::kFloat);
  check_dtype("candidates", candidates, at::kLong);
  check_dtype("root_token", root_token, at::kLong);
  check_dtype("num_offsets", num_offsets, at::kInt);
  TORCH_CHECK_VALUE(num_nodes >= 1 && num_nodes <= 256, "num_nodes: got ", num_nodes, ", expected 1..256");
  TORCH_CHECK_VALUE(
      num_lookahead >= 1 && num_lookahead <= num_nodes, "num_lookahead: got ", num_lookahead, ", expected 1..", num_nodes,
      " (num_nodes)");
  const Tensor table = probabilities.contiguous(), ids = candidates.contiguous(), roots = root_token.contiguous();
  const Tensor usable = num_offsets.contiguous();
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t count = usable.const_data_ptr<int32_t>()[b];
    TORCH_CHECK_VALUE(count >= 0 && count <= k, "num_offsets: got ", count, ", expected 0..", k);
  }

  const int64_t words = (num_nodes + 31) / 32;
  const auto options = probabilities.options().dtype(at::kInt);
  Tensor tokens = at::empty({batch, num_nodes}, options.dtype(at::kLong)), parents = at::empty({batch, num_nodes}, options);
  Tensor depths = at::empty({batch, num_nodes}, options), ancestors = at::empty({batch, num_nodes, words}, options);
  Tensor lookahead = at::empty({batch, num_lookahead}, options);
  for (int64_t b = 0; b < batch; ++b) {
    const cpu::DraftTree out{
        tokens.data_ptr<int64_t>() + b * num_nodes, parents.data_ptr<int32_t>() + b * num_nodes,
        depths.data_ptr<int32_t>() + b * num_nodes, ancestors.data_ptr<int32_t>() + b * num_nodes * words,
        lookahead.data_ptr<int32_t>() + b * num_lookahead};
    cpu::draft_tree(
        table.const_data_ptr<float>() + b * k * ranks, ids.const_data_ptr<int64_t>() + b * k * ranks, ranks,
        roots.const_data_ptr<int64_t>()[b], usable.const_data_ptr<int32_t>()[b], num_nodes, num_lookahead, out);
  }
  return {tokens, parents, depths, ancestors, lookahead};
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("draft_tree", draft_tree); }

}  // namespace firp
