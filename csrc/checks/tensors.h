// Checks of shapes, dtypes and devices, shared by all devices: the errors of firp_kernels/checks.py, argument named.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <ostream>
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

// How errors name a tensor: by its argument, and by its place where that is a list.
struct Name {
  Name(const char* argument, int64_t place = -1) : argument(argument), place(place) {}

  const char* argument;
  int64_t place;
};

inline std::ostream& operator<<(std::ostream& out, const Name& name) {
  out << name.argument;
  return name.place < 0 ? out : out << '[' << name.place << ']';
}

inline void check_shape(const Name& name, const at::Tensor& tensor, at::IntArrayRef expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = expected[i] == kAny || expected[i] == tensor.size(i);
  TORCH_CHECK_VALUE(same, name, ": got shape ", shape_text(tensor.sizes()), ", expected ", shape_text(expected));
}

inline void check_dtype(const Name& name, const at::Tensor& tensor, at::ScalarType expected) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, name, ": got dtype ", tensor.scalar_type(), ", expected ", expected);
}

inline void check_float(const char* name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble, name, ": got dtype ", type,
      ", expected Half or BFloat16 or Float or Double");
}

// Dtypes of the ops for few rows of a layer.
inline void check_few_row_dtype(const char* name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kBFloat16 || type == at::kFloat, name, ": got dtype ", type, ", expected BFloat16 or Float");
}

inline void check_last(const char* name, const at::Tensor& tensor, int64_t width) {
  TORCH_CHECK_VALUE(
      tensor.dim() >= 1 && tensor.size(-1) == width, name, ": got shape ", shape_text(tensor.sizes()),
      ", expected last dimension ", width);
}

// probabilities [B, k, .., ranks].
inline void check_some_marginals(const at::Tensor& probabilities) {
  const int64_t k = probabilities.size(1), ranks = probabilities.size(-1);
  TORCH_CHECK_VALUE(
      k >= 1 && ranks >= 1, "probabilities: got ", k, " offsets and ", ranks, " ranks, expected at least one of each");
}

// A tensor of a list: its device and dtype are those of the input.
inline void check_part(const Name& name, const at::Tensor& part, at::IntArrayRef shape, const at::Tensor& input) {
  TORCH_CHECK_VALUE(
      part.device() == input.device(), name, ": is on ", part.device(), ", expected ", input.device(), " (as input)");
  check_shape(name, part, shape);
  check_dtype(name, part, input.scalar_type());
}

// All on the device of the first.
inline void check_same_device(std::initializer_list<std::pair<const char*, const at::Tensor&>> tensors) {
  const auto& [first_name, first] = *tensors.begin();
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK_VALUE(
        tensor.device() == first.device(), name, ": is on ", tensor.device(), ", expected ", first.device(), " (as ",
        first_name, ")");
  }
}

// `problem`: what a check of firp/cpu/checks.h found wrong, or nothing.
inline void check_values(const std::string& problem) { TORCH_CHECK_VALUE(problem.empty(), problem); }

// The dimensions after `first` lie densely in memory, so that bytes can be copied.
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
