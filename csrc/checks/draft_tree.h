// What firp::draft_tree checks on every device, and its outputs.
#pragma once

#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "firp/cpu/checks.h"
#include "tensors.h"

namespace firp {

using DraftTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline void check_draft_tree(
    const at::Tensor& probabilities, const at::Tensor& candidates, const at::Tensor& root_token, const at::Tensor& num_offsets,
    int64_t num_nodes, int64_t num_lookahead, const std::optional<at::Tensor>& order) {
  check_same_device(
      {{"probabilities", probabilities},
       {"candidates", candidates},
       {"root_token", root_token},
       {"num_offsets", num_offsets},
       {"order", order ? *order : probabilities}});
  order ? check_shape("probabilities", probabilities, {kAny, kAny, kAny, kAny})
        : check_shape("probabilities", probabilities, {kAny, kAny, kAny});
  const int64_t batch = probabilities.size(0), k = probabilities.size(1), ranks = probabilities.size(-1);
  check_some_marginals(probabilities);
  check_shape("candidates", candidates, {batch, k, order ? probabilities.size(2) : ranks});
  if (order) {
    check_shape("order", *order, probabilities.sizes());
    check_dtype("order", *order, at::kInt);
  }
  check_shape("root_token", root_token, {batch});
  check_shape("num_offsets", num_offsets, {batch});
  check_dtype("probabilities", probabilities, at::kFloat);
  check_dtype("candidates", candidates, at::kLong);
  check_dtype("root_token", root_token, at::kLong);
  check_dtype("num_offsets", num_offsets, at::kInt);
  check_values(cpu::check_between("num_nodes", num_nodes, 1, cpu::kMaxNodes));
  TORCH_CHECK_VALUE(
      num_lookahead >= 1 && num_lookahead <= num_nodes, "num_lookahead: got ", num_lookahead, ", expected 1..", num_nodes,
      " (num_nodes)");
}

// tokens, parents, depths, ancestors, lookahead, not filled.
inline DraftTensors new_draft_tree(const at::Tensor& probabilities, int64_t num_nodes, int64_t num_lookahead) {
  const int64_t batch = probabilities.size(0);
  const auto integers = probabilities.options().dtype(at::kInt);
  return {
      at::empty({batch, num_nodes}, integers.dtype(at::kLong)), at::empty({batch, num_nodes}, integers),
      at::empty({batch, num_nodes}, integers), at::empty({batch, num_nodes, (num_nodes + 31) / 32}, integers),
      at::empty({batch, num_lookahead}, integers)};
}

}  // namespace firp
