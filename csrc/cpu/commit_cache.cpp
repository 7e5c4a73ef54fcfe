// firp::commit_cache on a CPU: checks and registration.
#include "../checks/commit_cache.h"

#include <torch/library.h>

#include "firp/cpu/cache.h"
#include "firp/cpu/checks.h"

namespace firp {
namespace {

void commit_cache(
    const at::Tensor& cache, const at::Tensor& context_lens, const at::Tensor& path, const at::Tensor& num_accepted,
    const at::Tensor& finished) {
  check_commit_cache(cache, context_lens, path, num_accepted, finished);
  const int64_t batch = cache.size(2);
  const at::Tensor nodes = path.contiguous(), counts = num_accepted.contiguous(), done = finished.contiguous();
  int32_t* lens = context_lens.data_ptr<int32_t>();
  const int32_t* accepted = counts.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < batch; ++b) {
    if (!done.const_data_ptr<bool>()[b]) {
      const int32_t* entries = nodes.const_data_ptr<int32_t>() + b * path.size(1);
      check_values(cpu::check_path(entries, path.size(1), accepted[b], lens[b], cache.size(3)));
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
