// firp::write_cache on a CPU: checks and registration.
#include <torch/library.h>

#include "../checks/tensors.h"
#include "firp/cpu/cache.h"
#include "firp/cpu/checks.h"

namespace firp {
namespace {

void copy_rows(const at::Tensor& rows, const at::Tensor& cache, const at::Tensor& context_lens) {
  const at::Tensor from = rows.stride(3) == 1 ? rows : rows.contiguous();
  const int64_t size = from.element_size();
  const cpu::WriteCache args{
      .rows = static_cast<const char*>(from.const_data_ptr()),
      .rows_batch = from.stride(0) * size,
      .rows_row = from.stride(1) * size,
      .rows_head = from.stride(2) * size,
      .cache = static_cast<char*>(cache.mutable_data_ptr()),
      .cache_batch = cache.stride(0) * size,
      .cache_slot = cache.stride(1) * size,
      .cache_head = cache.stride(2) * size,
      .context_lens = context_lens.const_data_ptr<int32_t>(),
      .num_rows = from.size(1),
      .heads = from.size(2),
      .head_bytes = from.size(3) * size,
  };
  for (int64_t b = 0; b < from.size(0); ++b) cpu::write_cache(args, b);
}

void write_cache(
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& key_cache, const at::Tensor& value_cache,
    const at::Tensor& context_lens) {
  check_same_device(
      {{"key", key}, {"value", value}, {"key_cache", key_cache}, {"value_cache", value_cache}, {"context_lens", context_lens}});
  check_shape("key", key, {kAny, kAny, kAny, kAny});
  check_shape("value", value, key.sizes());
  check_shape("key_cache", key_cache, {key.size(0), kAny, key.size(2), key.size(3)});
  check_shape("value_cache", value_cache, key_cache.sizes());
  check_shape("context_lens", context_lens, {key.size(0)});
  check_float("key", key);
  check_dtype("value", value, key.scalar_type());
  check_dtype("key_cache", key_cache, key.scalar_type());
  check_dtype("value_cache", value_cache, key.scalar_type());
  check_dtype("context_lens", context_lens, at::kInt);
  check_dense_slots("key_cache", key_cache, 1);
  check_dense_slots("value_cache", value_cache, 1);
  const at::Tensor lens = context_lens.contiguous();
  check_values(cpu::check_room(lens.const_data_ptr<int32_t>(), lens.numel(), key.size(1), key_cache.size(1)));
  copy_rows(key, key_cache, lens);
  copy_rows(value, value_cache, lens);
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("write_cache", write_cache); }

}  // namespace firp
