// firp::commit_cache on a CPU: checks and registration.
#include <torch/library.h>

#include "checks.h"
#include "firp/cpu/cache.h"

namespace firp {
namespace {

void check_path(const int32_t* path, int64_t length, int32_t accepted, int32_t start, int64_t capacity) {
  TORCH_CHECK_VALUE(
      accepted >= 0 && accepted < length, "num_accepted: got ", accepted, ", expected 0..", length - 1, " (path has ", length,
      " entries)");
  for (int64_t i = 0; i <= accepted; ++i) {
    TORCH_CHECK_VALUE(
        i == 0 ? path[0] == 0 : path[i] > path[i - 1], "path: got ", path[i], " at entry ", i, ", expected increasing nodes from 0");
  }
  TORCH_CHECK_VALUE(start >= 0, "context_lens: got ", start, ", expected at least 0");
  TORCH_CHECK_VALUE(
      start + path[accepted] + 1 <= capacity, "context_lens: ", start, " + ", path[accepted] + 1,
      " rows exceed the cache capacity of ", capacity, " slots");
}

void commit_cache(
    at::Tensor cache, at::Tensor context_lens, const at::Tensor& path, const at::Tensor& num_accepted, const at::Tensor& finished) {
  check_same_cpu({{"cache", cache}, {"context_lens", context_lens}, {"path", path}, {"num_accepted", num_accepted}, {"finished", finished}});
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
  const at::Tensor nodes = path.contiguous(), counts = num_accepted.contiguous(), done = finished.contiguous();
  int32_t* lens = context_lens.data_ptr<int32_t>();
  const int32_t* accepted = counts.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < batch; ++b) {
    if (!done.const_data_ptr<bool>()[b]) {
      check_path(nodes.const_data_ptr<int32_t>() + b * path.size(1), path.size(1), accepted[b], lens[b], cache.size(3));
    }
  }
  const int64_t size = cache.element_size();
  for (int64_t b = 0; b < batch; ++b) {
    if (done.const_data_ptr<bool>()[b]) continue;
    for (int64_t plane = 0; plane < 2 * cache.size(0); ++plane) {
      char* slots = static_cast<char*>(cache.mutable_data_ptr()) +
          (plane / 2 * cache.stride(0) + plane % 2 * cache.stride(1) + b * cache.stride(2)) * size;
      cpu::commit_cache(
          slots, cache.stride(3) * size, cache.size(4) * cache.size(5) * size, lens[b],
          nodes.const_data_ptr<int32_t>() + b * path.size(1), accepted[b] + 1);
    }
    lens[b] += accepted[b] + 1;
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("commit_cache", commit_cache); }

}  // namespace firp
