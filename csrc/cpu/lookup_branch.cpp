// firp::lookup_branch on a CPU: checks and registration.
#include "firp/cpu/lookup_branch.h"

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "../checks/tensors.h"
#include "firp/cpu/checks.h"

namespace firp {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> lookup_branch(
    const Tensor& history, const Tensor& context_lens, const Tensor& emitted, const Tensor& counts, const Tensor& tokens,
    const Tensor& parents, const Tensor& depths, const Tensor& ancestors, int64_t num_branch, int64_t least_match,
    int64_t most_match, int64_t num_replaced) {
  const std::pair<const char*, const Tensor&> wide[] = {
      {"history", history}, {"emitted", emitted}, {"counts", counts}, {"tokens", tokens}};
  const std::pair<const char*, const Tensor&> integers[] = {
      {"context_lens", context_lens}, {"parents", parents}, {"depths", depths}, {"ancestors", ancestors}};
  for (const auto& [name, tensor] : wide) check_same_device({{"history", history}, {name, tensor}});
  for (const auto& [name, tensor] : integers) check_same_device({{"history", history}, {name, tensor}});
  check_shape("tokens", tokens, {kAny, kAny});
  const int64_t batch = tokens.size(0), count = tokens.size(1), most_replaced = std::min(num_branch, count - 1);
  TORCH_CHECK_VALUE(
      num_branch >= 0 && count >= 1 && count + num_branch <= cpu::kMaxNodes, "num_branch: got ", num_branch, " for a tree of ",
      count, ", expected 1..", cpu::kMaxNodes, " together");
  TORCH_CHECK_VALUE(
      num_replaced >= 0 && num_replaced <= most_replaced, "num_replaced: got ", num_replaced, ", expected 0..", most_replaced,
      " (num_branch, and not the root)");
  TORCH_CHECK_VALUE(
      least_match >= 1 && least_match <= most_match, "least_match: got ", least_match, ", expected 1..", most_match,
      " (most_match)");
  const int64_t nodes = count + num_branch - num_replaced, old_words = (count + 31) / 32, words = (nodes + 31) / 32;
  check_shape("history", history, {batch, kAny});
  check_shape("context_lens", context_lens, {batch});
  check_shape("emitted", emitted, {batch, kAny});
  check_shape("counts", counts, {batch});
  check_shape("parents", parents, {batch, count});
  check_shape("depths", depths, {batch, count});
  check_shape("ancestors", ancestors, {batch, count, old_words});
  for (const auto& [name, tensor] : wide) check_dtype(name, tensor, at::kLong);
  for (const auto& [name, tensor] : integers) check_dtype(name, tensor, at::kInt);

  const int64_t slots = history.size(1), width = emitted.size(1);
  const Tensor text = history.contiguous(), lens = context_lens.contiguous(), new_tokens = emitted.contiguous();
  const Tensor new_counts = counts.contiguous(), ids = tokens.contiguous(), above = parents.contiguous();
  const Tensor levels = depths.contiguous(), masks = ancestors.contiguous();
  const int32_t* parent = above.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < above.numel(); ++i) check_values(cpu::check_between("parents", parent[i], -1, count - 1));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t last = lens.const_data_ptr<int32_t>()[b], emits = new_counts.const_data_ptr<int64_t>()[b];
    check_values(cpu::check_between("context_lens", last, 0, slots - 1));
    check_values(cpu::check_between("counts", emits, 0, width));
    TORCH_CHECK_VALUE(emits <= last + 1, "counts: got ", emits - last, " past context_lens, expected at most 1");
  }

  const auto narrow = parents.options();
  Tensor out_tokens = at::zeros({batch, nodes}, tokens.options()), out_parents = at::full({batch, nodes}, -1, narrow);
  Tensor out_depths = at::zeros({batch, nodes}, narrow), out_ancestors = at::zeros({batch, nodes, words}, narrow);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t* own = text.data_ptr<int64_t>() + b * slots;
    const int64_t last = lens.const_data_ptr<int32_t>()[b], emits = new_counts.const_data_ptr<int64_t>()[b];
    const int64_t* added = new_tokens.const_data_ptr<int64_t>() + b * width;
    std::copy(added, added + emits, own + last + 1 - emits);
    cpu::GrownTree tree{
        .tokens = out_tokens.data_ptr<int64_t>() + b * nodes,
        .parents = out_parents.data_ptr<int32_t>() + b * nodes,
        .depths = out_depths.data_ptr<int32_t>() + b * nodes,
        .ancestors = out_ancestors.data_ptr<int32_t>() + b * nodes * words,
        .num_nodes = count,
        .words = words,
    };
    std::copy_n(ids.const_data_ptr<int64_t>() + b * count, count, tree.tokens);
    std::copy_n(parent + b * count, count, tree.parents);
    std::copy_n(levels.const_data_ptr<int32_t>() + b * count, count, tree.depths);
    const int32_t* mask = masks.const_data_ptr<int32_t>() + b * count * old_words;
    for (int64_t node = 0; node < nodes; ++node) {
      int32_t* row = tree.ancestors + node * words;
      if (node < count)
        std::copy_n(mask + node * old_words, old_words, row);
      else
        row[node / 32] = static_cast<int32_t>(1u << (node % 32));
    }
    cpu::lookup_branch(own, last, num_branch, least_match, most_match, num_replaced, tree);
  }
  if (!text.is_same(history)) history.copy_(text);
  return {out_tokens, out_parents, out_depths, out_ancestors};
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("lookup_branch", lookup_branch); }

}  // namespace firp
