// firp::predictor_projection on a CPU: one pass of the few-row linear over all k maps. Checks and registration.
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <cstring>

#include "../checks/tensors.h"
#include "firp/cpu/checks.h"
#include "linear_rows.h"

namespace firp {
namespace {

template <typename T>
void run(const at::Tensor& sources, const at::Tensor& maps, at::Tensor& output) {
  const at::Tensor prepared = prepare_rows<T>(sources);
  const cpu::Linear<T> args = describe_linear<T>(prepared, maps, nullptr, output);
  over_outputs(args.outputs, args.width, [&](float* scratch, int64_t first, int64_t last) {
    cpu::linear(cpu::best_isa(), args, scratch, first, last);
  });
}

// Rows [rows, width] times maps [k * width, width]: [rows, k * width].
at::Tensor mapped(const at::Tensor& rows, const at::Tensor& maps) {
  if (rows.scalar_type() != at::kFloat && rows.scalar_type() != at::kBFloat16) return at::linear(rows, maps);
  at::Tensor output = at::empty({rows.size(0), maps.size(0)}, rows.options());
  rows.scalar_type() == at::kFloat ? run<float>(rows, maps, output) : run<cpu::bfloat16>(rows, maps, output);
  return output;
}

at::Tensor predictor_projection(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& lookahead) {
  check_same_device({{"hidden", hidden}, {"weight", weight}, {"lookahead", lookahead}});
  check_shape("hidden", hidden, {kAny, kAny, kAny});
  const int64_t batch = hidden.size(0), num_nodes = hidden.size(1), width = hidden.size(2);
  check_shape("weight", weight, {kAny, width, width});
  check_shape("lookahead", lookahead, {batch, kAny});
  check_float("hidden", hidden);
  check_dtype("weight", weight, hidden.scalar_type());
  check_dtype("lookahead", lookahead, at::kInt);
  const at::Tensor nodes = lookahead.contiguous();
  check_values(cpu::check_lookahead(nodes.const_data_ptr<int32_t>(), nodes.numel(), num_nodes));
  const int64_t slots = lookahead.size(1), k = weight.size(0);
  // Rows are few: copied as bytes, they take less time than as many calls of torch.
  const at::Tensor rows = hidden.contiguous();
  const int32_t* node = nodes.const_data_ptr<int32_t>();
  const int64_t row_bytes = width * rows.element_size();
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  const at::Tensor sources = at::empty({batch * slots, width}, hidden.options());
  char* source = static_cast<char*>(sources.mutable_data_ptr());
  for (int64_t i = 0; i < batch * slots; ++i) {
    const int64_t row = i / slots * num_nodes + std::max(node[i], 0);
    if (num_nodes) std::memcpy(source + i * row_bytes, from + row * row_bytes, row_bytes);
  }
  const at::Tensor pseudo = mapped(sources, dense_weight(weight.reshape({k * width, width})));
  const at::Tensor output = at::empty({batch, num_nodes + slots * k, width}, hidden.options());
  const char* made = static_cast<const char*>(pseudo.const_data_ptr());
  char* to = static_cast<char*>(output.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    std::memcpy(to, from + b * num_nodes * row_bytes, num_nodes * row_bytes);
    to += num_nodes * row_bytes;
    for (int64_t i = b * slots; i < (b + 1) * slots; ++i, to += k * row_bytes) {
      if (node[i] < 0) {
        std::memset(to, 0, k * row_bytes);
      } else {
        std::memcpy(to, made + i * k * row_bytes, k * row_bytes);
      }
    }
  }
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("predictor_projection", predictor_projection); }

}  // namespace firp
