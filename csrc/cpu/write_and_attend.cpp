// firp::write_and_attend on a CPU: firp::write_cache, then firp::tree_attention. Checks and registration.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>

#include "../checks/tensors.h"

namespace firp {
namespace {

using at::Tensor;

using WriteCache = void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
using TreeAttention = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, double,
    std::optional<int64_t>);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor write_and_attend(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& layer_cache, const Tensor& context_lens,
    const Tensor& depths, const Tensor& ancestors, const Tensor& lookahead, int64_t num_offsets, double scale,
    std::optional<int64_t> sliding_window) {
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
