// firp::decoder_layers on a CPU: firp::norm_qkv_rotary, firp::write_and_attend and firp::output_norm_mlp, layer after
// layer. Checks and registration; these ops check what they get.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <optional>

#include "../checks/tensors.h"
#include "find_op.h"

namespace firp {
namespace {

using at::Tensor;
using at::TensorList;

using NormQkvRotary = Tensor(const Tensor&, const Tensor&, double, TensorList, TensorList, const Tensor&, const Tensor&);
using WriteAndAttend = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    int64_t, double, std::optional<int64_t>, const std::optional<Tensor>&, const std::optional<Tensor>&);
using OutputNormMlp = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&, double, const Tensor&,
    const Tensor&, const Tensor&);

// `each` tensors of a layer, or none where that is allowed, on the device of `input`.
void check_weights(const char* name, TensorList tensors, const Tensor& input, size_t each, size_t layers, bool optional) {
  const size_t expected = each * layers;
  TORCH_CHECK_VALUE(
      tensors.size() == expected || (optional && tensors.empty()), name, ": got ", tensors.size(), ", expected ", expected,
      optional ? " or none" : "", " (", layers, " layers)");
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK_VALUE(
        tensors[i].device() == input.device(), name, "[", i, "]: is on ", tensors[i].device(), ", expected ", input.device(),
        " (as input)");
  }
}

Tensor decoder_layers(
    const Tensor& input, const Tensor& cos, const Tensor& sin, double eps, TensorList norms, TensorList projections,
    TensorList biases, TensorList outputs, TensorList output_biases, TensorList mlps, const Tensor& cache,
    const Tensor& context_lens, const Tensor& depths, const Tensor& ancestors, const Tensor& lookahead, int64_t num_offsets,
    double scale, std::optional<int64_t> sliding_window) {
  // As for a CPU kernel's own loops: autograd need not know of the tensors and views made here.
  const at::AutoDispatchBelowADInplaceOrView guard;
  check_same_device(
      {{"input", input},
       {"cos", cos},
       {"sin", sin},
       {"cache", cache},
       {"context_lens", context_lens},
       {"depths", depths},
       {"ancestors", ancestors},
       {"lookahead", lookahead}});
  check_shape("cache", cache, {kAny, 2, kAny, kAny, kAny, kAny});
  const size_t layers = cache.size(0);
  check_weights("norms", norms, input, 2, layers, false);
  check_weights("projections", projections, input, 3, layers, false);
  check_weights("biases", biases, input, 3, layers, true);
  check_weights("outputs", outputs, input, 1, layers, false);
  check_weights("output_biases", output_biases, input, 1, layers, true);
  check_weights("mlps", mlps, input, 3, layers, false);
  check_shape("cos", cos, {kAny, kAny, kAny});
  static const auto start = find_op<NormQkvRotary>("firp::norm_qkv_rotary");
  static const auto attend = find_op<WriteAndAttend>("firp::write_and_attend");
  static const auto end = find_op<OutputNormMlp>("firp::output_norm_mlp");
  const Tensor cosines = cos.contiguous(), sines = sin.contiguous();
  const Tensor lens = context_lens.contiguous(), levels = depths.contiguous(), masks = ancestors.contiguous();
  const Tensor nodes = lookahead.contiguous();
  const int64_t kv_heads = cache.size(4);
  Tensor hidden = input;
  for (size_t i = 0; i < layers; ++i) {
    const Tensor heads = start.call(
        hidden, norms[2 * i], eps, projections.slice(3 * i, 3), biases.empty() ? biases : biases.slice(3 * i, 3), cosines,
        sines);
    const int64_t queries = heads.size(2) - 2 * kv_heads;
    TORCH_CHECK_VALUE(
        queries > 0, "projections[", 3 * i, "]: got ", heads.size(2), " heads with keys and values, expected more than ",
        2 * kv_heads);
    const Tensor attended = attend.call(
        heads.narrow(2, 0, queries), heads.narrow(2, queries, kv_heads), heads.narrow(2, queries + kv_heads, kv_heads),
        cache.select(0, i), lens, levels, masks, nodes, num_offsets, scale, sliding_window, std::nullopt, std::nullopt);
    const std::optional<Tensor> bias = output_biases.empty() ? std::nullopt : std::make_optional(output_biases[i]);
    hidden = end.call(attended, hidden, outputs[i], bias, norms[2 * i + 1], eps, mlps[3 * i], mlps[3 * i + 1], mlps[3 * i + 2]);
  }
  return layers ? hidden : input.clone();
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("decoder_layers", decoder_layers); }

}  // namespace firp
