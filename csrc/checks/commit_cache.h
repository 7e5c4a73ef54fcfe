// What firp::commit_cache checks on every device.
#pragma once

#include "tensors.h"

namespace firp {

inline void check_commit_cache(
    const at::Tensor& cache, const at::Tensor& context_lens, const at::Tensor& path, const at::Tensor& num_accepted,
    const at::Tensor& finished) {
  check_same_device(
      {{"cache", cache},
       {"context_lens", context_lens},
       {"path", path},
       {"num_accepted", num_accepted},
       {"finished", finished}});
  check_shape("cache", cache, {kAny, 2, kAny, kAny, kAny, kAny});
  const int64_t batch = cache.size(2);
  check_shape("context_lens", context_lens, {batch});
  check_shape("path", path, {batch, kAny});
  check_shape("num_accepted", num_accepted, {batch});
  check_shape("finished", finished, {batch});
  check_float("cache", cache);
  check_dtype("context_lens", context_lens, at::kInt);
  check_dtype("path", path, at::kInt);
  check_dtype("num_accepted", num_accepted, at::kInt);
  check_dtype("finished", finished, at::kBool);
  check_dense_slots("cache", cache, 4);
  TORCH_CHECK_VALUE(batch <= 1 || context_lens.is_contiguous(), "context_lens: got a strided tensor, expected a dense one");
}

}  // namespace firp
