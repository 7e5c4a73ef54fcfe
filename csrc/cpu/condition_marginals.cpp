// firp::condition_marginals on a CPU: checks and registration.
#include "firp/cpu/condition_marginals.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../checks/tensors.h"

namespace firp {
namespace {

using at::Tensor;

void check_tokens(const char* name, const Tensor& tokens, int64_t vocab) {
  const int64_t* values = tokens.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] < vocab, name, ": got ", values[i], ", expected 0..", vocab - 1);
  }
}

template <typename T>
cpu::TokenTable<T> table(const Tensor& rows) {
  return {static_cast<const T*>(rows.const_data_ptr()), rows.stride(0)};
}

// All dense, but for the rows of the tables, which may lie apart.
template <typename T>
void run(
    const Tensor& probabilities, const Tensor& candidates, const Tensor& root_token, const Tensor& source, const Tensor& target,
    Tensor& out_probabilities, Tensor& order) {
  const int64_t offsets = probabilities.size(1), count = probabilities.size(2), ranks = order.size(3);
  for (int64_t b = 0; b < probabilities.size(0); ++b) {
    const int64_t in = b * offsets * count, out = in * ranks;
    cpu::condition_marginals(
        probabilities.const_data_ptr<float>() + in, candidates.const_data_ptr<int64_t>() + in, offsets, count,
        root_token.const_data_ptr<int64_t>()[b], table<T>(source), table<T>(target), source.size(1), ranks,
        out_probabilities.data_ptr<float>() + out, order.data_ptr<int32_t>() + out);
  }
}

std::tuple<Tensor, Tensor> condition_marginals(
    const Tensor& probabilities, const Tensor& candidates, const Tensor& root_token, const Tensor& source, const Tensor& target,
    int64_t num_ranks) {
  check_same_device(
      {{"probabilities", probabilities},
       {"candidates", candidates},
       {"root_token", root_token},
       {"source", source},
       {"target", target}});
  check_shape("probabilities", probabilities, {kAny, kAny, kAny});
  check_some_marginals(probabilities);
  check_shape("candidates", candidates, probabilities.sizes());
  check_shape("root_token", root_token, {probabilities.size(0)});
  check_shape("source", source, {kAny, kAny});
  check_shape("target", target, source.sizes());
  check_dtype("probabilities", probabilities, at::kFloat);
  check_dtype("candidates", candidates, at::kLong);
  check_dtype("root_token", root_token, at::kLong);
  check_float("source", source);
  check_dtype("target", target, source.scalar_type());
  const int64_t count = probabilities.size(2), vocab = source.size(0);
  TORCH_CHECK_VALUE(num_ranks >= 1 && num_ranks <= count, "num_ranks: got ", num_ranks, ", expected 1..", count);
  const Tensor given = probabilities.contiguous(), tokens = candidates.contiguous(), roots = root_token.contiguous();
  check_tokens("candidates", tokens, vocab);
  check_tokens("root_token", roots, vocab);
  const Tensor from = source.stride(1) == 1 ? source : source.contiguous();
  const Tensor to = target.stride(1) == 1 ? target : target.contiguous();
  Tensor out_probabilities = at::empty({given.size(0), given.size(1), count, num_ranks}, probabilities.options());
  Tensor order = at::empty(out_probabilities.sizes(), candidates.options().dtype(at::kInt));
  switch (source.scalar_type()) {
    case at::kHalf: run<cpu::float16>(given, tokens, roots, from, to, out_probabilities, order); break;
    case at::kBFloat16: run<cpu::bfloat16>(given, tokens, roots, from, to, out_probabilities, order); break;
    case at::kDouble: run<double>(given, tokens, roots, from, to, out_probabilities, order); break;
    default: run<float>(given, tokens, roots, from, to, out_probabilities, order);
  }
  return {out_probabilities, order};
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("condition_marginals", condition_marginals); }

}  // namespace firp
