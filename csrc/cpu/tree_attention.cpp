// firp::tree_attention on a CPU: checks, threads, registration.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks/attention.h"
#include "layer_rows.h"

namespace firp {

template void cpu::tree_attention(cpu::Isa, const cpu::TreeAttention<float>&, int64_t, int64_t, int64_t, int64_t);
template void cpu::tree_attention(cpu::Isa, const cpu::TreeAttention<cpu::bfloat16>&, int64_t, int64_t, int64_t, int64_t);

namespace {

template <typename T>
cpu::TreeAttention<T> describe(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, at::Tensor& output, const at::Tensor& context_lens,
    const at::Tensor& depths, const at::Tensor& ancestors, const at::Tensor& lookahead, int64_t num_offsets, double scale,
    int64_t window) {
  return {
      .query = static_cast<const T*>(query.const_data_ptr()),
      .query_batch = query.stride(0),
      .query_row = query.stride(1),
      .query_head = query.stride(2),
      .key = static_cast<const T*>(key.const_data_ptr()),
      .value = static_cast<const T*>(value.const_data_ptr()),
      .key_batch = key.stride(0),
      .key_slot = key.stride(1),
      .key_head = key.stride(2),
      .value_batch = value.stride(0),
      .value_slot = value.stride(1),
      .value_head = value.stride(2),
      .output = static_cast<T*>(output.mutable_data_ptr()),
      .context_lens = context_lens.const_data_ptr<int32_t>(),
      .depths = depths.const_data_ptr<int32_t>(),
      .ancestors = ancestors.const_data_ptr<int32_t>(),
      .lookahead = lookahead.const_data_ptr<int32_t>(),
      .rows = query.size(1),
      .num_nodes = depths.size(1),
      .num_lookahead = lookahead.size(1),
      .num_offsets = num_offsets,
      .heads = query.size(2),
      .kv_heads = key.size(2),
      .head_dim = query.size(3),
      .window = window,
      .scale = scale,
  };
}

at::Tensor dense_rows(const at::Tensor& tensor) { return tensor.stride(3) == 1 ? tensor : tensor.contiguous(); }

at::Tensor tree_attention(
    const at::Tensor& query, const at::Tensor& key_cache, const at::Tensor& value_cache, const at::Tensor& context_lens,
    const at::Tensor& depths, const at::Tensor& ancestors, const at::Tensor& lookahead, int64_t num_offsets, double scale,
    std::optional<int64_t> sliding_window) {
  check_same_device(
      {{"query", query},
       {"key_cache", key_cache},
       {"value_cache", value_cache},
       {"context_lens", context_lens},
       {"depths", depths},
       {"ancestors", ancestors},
       {"lookahead", lookahead}});
  check_shape("query", query, {kAny, kAny, kAny, kAny});
  const int64_t batch = query.size(0), rows = query.size(1), heads = query.size(2), head_dim = query.size(3);
  check_shape("key_cache", key_cache, {batch, kAny, kAny, head_dim});
  check_shape("value_cache", value_cache, key_cache.sizes());
  check_float("query", query);
  check_dtype("key_cache", key_cache, query.scalar_type());
  check_dtype("value_cache", value_cache, query.scalar_type());
  TORCH_CHECK_VALUE(
      key_cache.size(2) > 0 && heads % key_cache.size(2) == 0, "query: ", heads, " heads are no multiple of the cache's ",
      key_cache.size(2), " heads");
  check_tree(batch, rows, context_lens, depths, ancestors, lookahead, num_offsets, sliding_window);
  const at::Tensor lens = context_lens.contiguous(), levels = depths.contiguous(), masks = ancestors.contiguous();
  const at::Tensor nodes = lookahead.contiguous();
  check_tree_values(lens, nodes, rows, depths.size(1), key_cache.size(1));

  const at::Tensor q = dense_rows(query), k = dense_rows(key_cache), v = dense_rows(value_cache);
  at::Tensor output = at::empty(query.sizes(), query.options().memory_format(at::MemoryFormat::Contiguous));
  const auto go = [&](auto number) {
    using T = decltype(number);
    attend_rows(
        describe<T>(q, k, v, output, lens, levels, masks, nodes, num_offsets, scale, sliding_window.value_or(0)), batch);
  };
  switch (query.scalar_type()) {
    case at::kFloat: go(float{}); break;
    case at::kBFloat16: go(cpu::bfloat16{}); break;
    case at::kHalf: go(cpu::float16{}); break;
    default: go(double{}); break;
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("tree_attention", tree_attention); }

}  // namespace firp
