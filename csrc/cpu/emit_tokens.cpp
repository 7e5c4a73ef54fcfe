// firp::emit_tokens on a CPU: checks and registration.
#include "firp/cpu/emit_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "../checks/tensors.h"

namespace firp {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> emit_tokens(
    const Tensor& path, const Tensor& num_accepted, const Tensor& bonus, const Tensor& last_slot, const Tensor& levels_up,
    const Tensor& status, const Tensor& tokens, const Tensor& stop_tokens, const Tensor& context_lens, const Tensor& finished,
    const Tensor& remaining, int64_t num_offsets, int64_t num_embeddings, int64_t max_context) {
  check_same_device(
      {{"path", path},
       {"num_accepted", num_accepted},
       {"bonus", bonus},
       {"last_slot", last_slot},
       {"levels_up", levels_up},
       {"status", status},
       {"tokens", tokens},
       {"stop_tokens", stop_tokens},
       {"context_lens", context_lens},
       {"finished", finished},
       {"remaining", remaining}});
  check_shape("path", path, {kAny, kAny});
  const int64_t batch = path.size(0), width = path.size(1);
  TORCH_CHECK_VALUE(width >= 1, "path: got shape ", shape_text(path.sizes()), ", expected at least the root");
  const std::pair<const char*, const Tensor&> integers[] = {
      {"num_accepted", num_accepted},
      {"last_slot", last_slot},
      {"levels_up", levels_up},
      {"status", status},
      {"context_lens", context_lens}};
  for (const auto& [name, tensor] : integers) check_shape(name, tensor, {batch});
  check_shape("bonus", bonus, {batch});
  check_shape("finished", finished, {batch});
  check_shape("remaining", remaining, {batch});
  check_shape("tokens", tokens, {batch, kAny});
  check_shape("stop_tokens", stop_tokens, {kAny});
  check_dtype("path", path, at::kInt);
  for (const auto& [name, tensor] : integers) check_dtype(name, tensor, at::kInt);
  check_dtype("bonus", bonus, at::kLong);
  check_dtype("tokens", tokens, at::kLong);
  check_dtype("stop_tokens", stop_tokens, at::kLong);
  check_dtype("remaining", remaining, at::kLong);
  check_dtype("finished", finished, at::kBool);
  TORCH_CHECK_VALUE(num_offsets >= 0, "num_offsets: got ", num_offsets, ", expected at least 0");
  TORCH_CHECK_VALUE(num_embeddings >= 1, "num_embeddings: got ", num_embeddings, ", expected at least 1");
  const Tensor nodes = path.contiguous(), accepted = num_accepted.contiguous(), choice = bonus.contiguous();
  const Tensor slot = last_slot.contiguous(), up = levels_up.contiguous(), broken = status.contiguous();
  const Tensor ids = tokens.contiguous(), stops = stop_tokens.contiguous(), lens = context_lens.contiguous();
  const Tensor before = finished.contiguous(), left = remaining.contiguous();
  const int32_t* node = nodes.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < nodes.numel(); ++i) {
    TORCH_CHECK_VALUE(node[i] >= -1 && node[i] < ids.size(1), "path: got ", node[i], ", expected -1..", ids.size(1) - 1);
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t count = accepted.const_data_ptr<int32_t>()[b];
    TORCH_CHECK_VALUE(count >= 0 && count < width, "num_accepted: got ", count, ", expected 0..", width - 1);
  }

  const auto options = path.options(), wide = options.dtype(at::kLong);
  Tensor out_tokens = at::empty({batch, width}, wide), counts = at::empty({batch}, wide);
  Tensor kept = at::empty({batch}, options), out_finished = at::empty({batch}, options.dtype(at::kBool));
  Tensor root = at::empty({batch}, wide), rows = at::empty({batch, num_offsets}, wide);
  Tensor usable = at::empty({batch}, options), packed = at::empty({batch, width + 3}, wide);
  const cpu::EmitTokens args{
      .path = node,
      .num_accepted = accepted.const_data_ptr<int32_t>(),
      .bonus = choice.const_data_ptr<int64_t>(),
      .last_slot = slot.const_data_ptr<int32_t>(),
      .levels_up = up.const_data_ptr<int32_t>(),
      .status = broken.const_data_ptr<int32_t>(),
      .tokens = ids.const_data_ptr<int64_t>(),
      .stop_tokens = stops.const_data_ptr<int64_t>(),
      .context_lens = lens.const_data_ptr<int32_t>(),
      .finished = before.const_data_ptr<bool>(),
      .remaining = left.data_ptr<int64_t>(),
      .out_tokens = out_tokens.data_ptr<int64_t>(),
      .counts = counts.data_ptr<int64_t>(),
      .kept = kept.data_ptr<int32_t>(),
      .out_finished = out_finished.data_ptr<bool>(),
      .root = root.data_ptr<int64_t>(),
      .rows = rows.data_ptr<int64_t>(),
      .usable = usable.data_ptr<int32_t>(),
      .packed = packed.data_ptr<int64_t>(),
      .width = width,
      .num_nodes = ids.size(1),
      .num_stops = stops.size(0),
      .num_offsets = num_offsets,
      .num_embeddings = num_embeddings,
      .max_context = max_context,
  };
  for (int64_t b = 0; b < batch; ++b) cpu::emit_tokens(args, b);
  if (!left.is_same(remaining)) remaining.copy_(left);
  return {out_tokens, counts, kept, out_finished, root, rows, usable, packed};
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("emit_tokens", emit_tokens); }

}  // namespace firp
