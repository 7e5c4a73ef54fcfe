// Checks of what attention over a tree takes beside queries and cache.
#pragma once

#include <optional>

#include "firp/cpu/checks.h"
#include "tensors.h"

namespace firp {

// The tree and context of `rows` rows each of `batch` sequences.
inline void check_tree(
    int64_t batch, int64_t rows, const at::Tensor& context_lens, const at::Tensor& depths, const at::Tensor& ancestors,
    const at::Tensor& lookahead, int64_t num_offsets, std::optional<int64_t> sliding_window) {
  check_shape("context_lens", context_lens, {batch});
  check_shape("depths", depths, {batch, kAny});
  const int64_t num_nodes = depths.size(1);
  check_values(cpu::check_between("depths", num_nodes, 1, cpu::kMaxNodes, " nodes"));
  check_shape("ancestors", ancestors, {batch, num_nodes, (num_nodes + 31) / 32});
  check_shape("lookahead", lookahead, {batch, kAny});
  check_dtype("context_lens", context_lens, at::kInt);
  check_dtype("depths", depths, at::kInt);
  check_dtype("ancestors", ancestors, at::kInt);
  check_dtype("lookahead", lookahead, at::kInt);
  TORCH_CHECK_VALUE(num_offsets >= 0, "num_offsets: got ", num_offsets, ", expected at least 0");
  const int64_t with_pseudo = num_nodes + lookahead.size(1) * num_offsets;
  TORCH_CHECK_VALUE(
      rows == num_nodes || rows == with_pseudo, "query: got ", rows, " rows, expected ", num_nodes, " (nodes) or ", with_pseudo,
      " (with pseudo rows)");
  TORCH_CHECK_VALUE(
      !sliding_window || *sliding_window >= 1, "sliding_window: got ", sliding_window.value_or(0),
      ", expected at least 1 or None");
}

// Their values, of dense tensors.
inline void check_tree_values(
    const at::Tensor& context_lens, const at::Tensor& lookahead, int64_t rows, int64_t num_nodes, int64_t slots) {
  check_values(cpu::check_room(context_lens.const_data_ptr<int32_t>(), context_lens.numel(), rows, slots));
  check_values(cpu::check_lookahead(lookahead.const_data_ptr<int32_t>(), lookahead.numel(), num_nodes));
}

}  // namespace firp
