// Argument checks shared by the CPU implementations: the errors of firp_kernels/checks.py, argument named.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <string>
#include <utility>

namespace firp {

constexpr int64_t kAny = -1;

inline std::string shape_text(at::IntArrayRef shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i ? ", " : "") + (shape[i] == kAny ? std::string("*") : std::to_string(shape[i]));
  }
  return text + "]";
}

inline void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = expected[i] == kAny || expected[i] == tensor.size(i);
  TORCH_CHECK_VALUE(same, name, ": got shape ", shape_text(tensor.sizes()), ", expected ", shape_text(expected));
}

inline void check_dtype(const char* name, const at::Tensor& tensor, at::ScalarType expected) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, name, ": got dtype ", tensor.scalar_type(), ", expected ", expected);
}

inline void check_float(const char* name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble, name, ": got dtype ", type,
      ", expected Half or BFloat16 or Float or Double");
}

// Dtypes of the ops that serve few rows of a layer.
inline void check_few_row_dtype(const char* name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kBFloat16 || type == at::kFloat, name, ": got dtype ", type, ", expected BFloat16 or Float");
}

inline void check_last(const char* name, const at::Tensor& tensor, int64_t width) {
  TORCH_CHECK_VALUE(
      tensor.dim() >= 1 && tensor.size(-1) == width, name, ": got shape ", shape_text(tensor.sizes()),
      ", expected last dimension ", width);
}

inline void check_same_cpu(std::initializer_list<std::pair<const char*, const at::Tensor&>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, ": is on ", tensor.device(), ", expected cpu");
  }
}

inline void check_num_nodes(const char* name, int64_t num_nodes) {
  TORCH_CHECK_VALUE(num_nodes >= 1 && num_nodes <= 256, name, ": got ", num_nodes, " nodes, expected 1..256");
}

// Lengths within the cache; `context_lens` is dense.
inline void check_room(const at::Tensor& context_lens, int64_t rows, int64_t capacity) {
  const int32_t* lens = context_lens.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < context_lens.numel(); ++b) {
    TORCH_CHECK_VALUE(lens[b] >= 0, "context_lens: got ", lens[b], ", expected at least 0");
    TORCH_CHECK_VALUE(
        lens[b] + rows <= capacity, "context_lens: ", lens[b], " + ", rows, " rows exceed the cache capacity of ", capacity,
        " slots");
  }
}

// Nodes within the tree; `lookahead` is dense.
inline void check_lookahead(const at::Tensor& lookahead, int64_t num_nodes) {
  const int32_t* nodes = lookahead.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < lookahead.numel(); ++i) {
    TORCH_CHECK_VALUE(
        nodes[i] >= -1 && nodes[i] < num_nodes, "lookahead: got ", nodes[i], ", expected -1..", num_nodes - 1);
  }
}

// The root first, every other node behind its parent; `parents` [B, N] is dense.
inline void check_parents(const at::Tensor& parents) {
  const int32_t* links = parents.const_data_ptr<int32_t>();
  const int64_t num_nodes = parents.size(1);
  for (int64_t i = 0; i < parents.numel(); ++i) {
    const int64_t node = i % num_nodes;
    TORCH_CHECK_VALUE(node != 0 || links[i] == -1, "parents: node 0 is the root, expected parent -1, got ", links[i]);
    TORCH_CHECK_VALUE(
        links[i] >= -1 && (node == 0 || links[i] < node), "parents: got ", links[i], " for node ", node,
        ", a parent must be -1 or come before its child");
  }
}

// The dimensions behind `first` lie densely in memory, so that bytes can be copied.
inline void check_dense_slots(const char* name, const at::Tensor& tensor, int64_t first) {
  const int64_t last = tensor.dim() - 1;
  TORCH_CHECK_VALUE(
      tensor.size(last) <= 1 || tensor.stride(last) == 1, name, ": got a strided last dimension, expected a dense one");
  if (first < last) {
    TORCH_CHECK_VALUE(
        first + 1 > last || tensor.size(first) <= 1 || first == 1 || tensor.stride(first) == tensor.size(last), name,
        ": got strided heads, expected dense slots");
  }
}

}  // namespace firp
