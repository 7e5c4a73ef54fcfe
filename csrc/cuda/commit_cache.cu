// firp::commit_cache on CUDA: checks and registration. Values stay on the device and are not checked.
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "../checks/commit_cache.h"
#include "firp/cuda/commit_cache.cuh"
#include "stream.h"

namespace firp {
namespace {

void commit_cache(
    const at::Tensor& cache, const at::Tensor& context_lens, const at::Tensor& path, const at::Tensor& num_accepted,
    const at::Tensor& finished) {
  check_commit_cache(cache, context_lens, path, num_accepted, finished);
  TORCH_CHECK_VALUE(
      cache.size(3) < cuda::kMaxCapacity, "cache: got ", cache.size(3), " slots, expected fewer than ", cuda::kMaxCapacity);
  const c10::DeviceGuard guard(cache.device());
  const at::Tensor nodes = path.contiguous(), counts = num_accepted.contiguous(), done = finished.contiguous();
  const int64_t size = cache.element_size();
  const cuda::CommitCache args{
      .cache = static_cast<char*>(cache.mutable_data_ptr()),
      .layer = cache.stride(0) * size,
      .plane = cache.stride(1) * size,
      .sequence = cache.stride(2) * size,
      .slot = cache.stride(3) * size,
      .context_lens = context_lens.data_ptr<int32_t>(),
      .path = nodes.const_data_ptr<int32_t>(),
      .num_accepted = counts.const_data_ptr<int32_t>(),
      .finished = done.const_data_ptr<bool>(),
      .layers = static_cast<int32_t>(cache.size(0)),
      .slot_bytes = static_cast<int32_t>(cache.size(4) * cache.size(5) * size),
      .path_length = static_cast<int32_t>(path.size(1)),
  };
  check_launch(cuda::commit_cache(args, cache.size(2), current_stream(cache)));
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CUDA, library) { library.impl("commit_cache", commit_cache); }

}  // namespace firp
