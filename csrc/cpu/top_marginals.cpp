// firp::top_marginals on a CPU: checks, threads, registration.
#include "firp/cpu/top_marginals.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../checks/tensors.h"

namespace firp {
namespace {

template <typename T>
void run(const at::Tensor& logits, const int64_t* rows, at::Tensor& probabilities, at::Tensor& candidates) {
  const int64_t vocab = logits.size(2), count = probabilities.size(1), ranks = probabilities.size(2);
  const T* scores = static_cast<const T*>(logits.const_data_ptr());
  at::parallel_for(0, probabilities.size(0) * count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* row = scores + i / count * logits.stride(0) + rows[i] * logits.stride(1);
      cpu::top_marginals(
          cpu::best_isa(), row, vocab, ranks, probabilities.data_ptr<float>() + i * ranks,
          candidates.data_ptr<int64_t>() + i * ranks);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> top_marginals(const at::Tensor& logits, const at::Tensor& rows, int64_t num_ranks) {
  check_same_device({{"logits", logits}, {"rows", rows}});
  check_shape("logits", logits, {kAny, kAny, kAny});
  const int64_t batch = logits.size(0), vocab = logits.size(2);
  check_shape("rows", rows, {batch, kAny});
  check_float("logits", logits);
  check_dtype("rows", rows, at::kLong);
  TORCH_CHECK_VALUE(num_ranks >= 1 && num_ranks <= vocab, "num_ranks: got ", num_ranks, ", expected 1..", vocab);
  const at::Tensor dense = logits.stride(2) == 1 ? logits : logits.contiguous(), index = rows.contiguous();
  const int64_t* chosen = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    TORCH_CHECK_VALUE(
        chosen[i] >= 0 && chosen[i] < logits.size(1), "rows: got ", chosen[i], ", expected 0..", logits.size(1) - 1);
  }
  at::Tensor probabilities = at::empty({batch, rows.size(1), num_ranks}, logits.options().dtype(at::kFloat));
  at::Tensor candidates = at::empty(probabilities.sizes(), logits.options().dtype(at::kLong));
  switch (logits.scalar_type()) {
    case at::kHalf: run<cpu::float16>(dense, chosen, probabilities, candidates); break;
    case at::kBFloat16: run<cpu::bfloat16>(dense, chosen, probabilities, candidates); break;
    case at::kDouble: run<double>(dense, chosen, probabilities, candidates); break;
    default: run<float>(dense, chosen, probabilities, candidates);
  }
  return {probabilities, candidates};
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("top_marginals", top_marginals); }

}  // namespace firp
