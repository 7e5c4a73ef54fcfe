// firp::write_and_attend on a CPU: rotary where it is asked for, firp::write_cache, then firp::tree_attention. Checks and
// registration.
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include <optional>
#include <utility>

#include "../checks/tensors.h"
#include "find_op.h"

namespace firp {
namespace {

using at::Tensor;

using WriteCache = void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
using TreeAttention = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double,
    std::optional<int64_t>);

// rows [B, R, H, D] after rotary, in the roundings of torch's own products and sums.
Tensor rotated(const Tensor& rows, const Tensor& cos, const Tensor& sin) {
  const int64_t half = rows.size(3) / 2;
  const Tensor swapped = at::cat({rows.narrow(3, half, half).neg(), rows.narrow(3, 0, half)}, 3);
  return rows.mul(cos.unsqueeze(2)).add(swapped.mul(sin.unsqueeze(2)));
}

void check_rotary(const Tensor& key, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  TORCH_CHECK_VALUE(
      cos.has_value() == sin.has_value(), "sin: got ", sin ? "a tensor" : "None", ", expected cos and sin, or neither");
  if (!cos) return;
  for (const auto& [name, part] : {std::pair<const char*, const Tensor&>{"cos", *cos}, {"sin", *sin}}) {
    check_same_device({{"key", key}, {name, part}});
    check_shape(name, part, {key.size(0), key.size(1), key.size(3)});
    check_dtype(name, part, key.scalar_type());
  }
  TORCH_CHECK_VALUE(key.size(3) % 2 == 0, "cos: got it with head_dim ", key.size(3), ", expected an even one");
}

Tensor write_and_attend(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& layer_cache, const Tensor& context_lens,
    const Tensor& depths, const Tensor& ancestors, const Tensor& lookahead, int64_t num_offsets, double scale,
    std::optional<int64_t> sliding_window, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  check_same_device(
      {{"query", query},
       {"key", key},
       {"value", value},
       {"layer_cache", layer_cache},
       {"context_lens", context_lens},
       {"depths", depths},
       {"ancestors", ancestors},
       {"lookahead", lookahead}});
  check_shape("key", key, {kAny, kAny, kAny, kAny});
  check_shape("layer_cache", layer_cache, {2, key.size(0), kAny, key.size(2), key.size(3)});
  check_shape("query", query, {key.size(0), key.size(1), kAny, key.size(3)});
  check_dtype("key", key, query.scalar_type());
  check_dtype("layer_cache", layer_cache, query.scalar_type());
  check_rotary(key, cos, sin);
  if (cos) {
    const Tensor rotated_query = rotated(query, *cos, *sin), rotated_key = rotated(key, *cos, *sin);
    return write_and_attend(
        rotated_query, rotated_key, value, layer_cache, context_lens, depths, ancestors, lookahead, num_offsets, scale,
        sliding_window, std::nullopt, std::nullopt);
  }
  static const auto write_cache = find_op<WriteCache>("firp::write_cache");
  static const auto tree_attention = find_op<TreeAttention>("firp::tree_attention");
  const Tensor key_cache = layer_cache.select(0, 0), value_cache = layer_cache.select(0, 1);
  write_cache.call(key, value, key_cache, value_cache, context_lens);
  return tree_attention.call(
      query, key_cache, value_cache, context_lens, depths, ancestors, lookahead, num_offsets, scale, sliding_window);
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("write_and_attend", write_and_attend); }

}  // namespace firp
