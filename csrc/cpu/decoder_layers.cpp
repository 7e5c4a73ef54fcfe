// firp::decoder_layers on a CPU: what firp::norm_qkv_rotary, firp::write_and_attend and firp::output_norm_mlp do, layer
// after layer, in memory that all layers share. Checks, threads, registration.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../checks/attention.h"
#include "firp/cpu/cache.h"
#include "layer_rows.h"

namespace firp {
namespace {

using at::Tensor;
using at::TensorList;

// Lists as the op takes them; `biases` and `output_biases` may be empty.
struct Lists {
  TensorList norms, projections, biases, outputs, output_biases, mlps;
};

void check_number(const char* name, TensorList tensors, size_t each, size_t layers, bool optional) {
  const size_t expected = each * layers;
  TORCH_CHECK_VALUE(
      tensors.size() == expected || (optional && tensors.empty()), name, ": got ", tensors.size(), ", expected ", expected,
      optional ? " or none" : "", " (", layers, " layers)");
}

void check_layer(const Lists& lists, int64_t i, const Tensor& input, int64_t kv_heads, int64_t head_dim) {
  const int64_t width = input.size(2), keys = kv_heads * head_dim;
  for (const int64_t n : {2 * i, 2 * i + 1}) check_part({"norms", n}, lists.norms[n], {width}, input);
  const Tensor& query = lists.projections[3 * i];
  check_part({"projections", 3 * i}, query, {kAny, width}, input);
  for (const int64_t n : {3 * i + 1, 3 * i + 2}) check_part({"projections", n}, lists.projections[n], {keys, width}, input);
  const int64_t outputs = query.size(0);
  TORCH_CHECK_VALUE(
      keys > 0 && outputs > 0 && outputs % keys == 0, "projections[", 3 * i, "]: got ", outputs,
      " outputs, expected a multiple of ", keys, ", those of the keys");
  for (int64_t n = 3 * i; !lists.biases.empty() && n < 3 * i + 3; ++n) {
    check_part({"biases", n}, lists.biases[n], {lists.projections[n].size(0)}, input);
  }
  check_part({"outputs", i}, lists.outputs[i], {width, outputs}, input);
  if (!lists.output_biases.empty()) check_part({"output_biases", i}, lists.output_biases[i], {width}, input);
  const Tensor& gate = lists.mlps[3 * i];
  check_part({"mlps", 3 * i}, gate, {kAny, width}, input);
  check_part({"mlps", 3 * i + 1}, lists.mlps[3 * i + 1], gate.sizes(), input);
  check_part({"mlps", 3 * i + 2}, lists.mlps[3 * i + 2], {width, gate.size(0)}, input);
}

// Weights as the kernels read them: copies of those that are not dense, held as long as this is.
class Dense {
 public:
  explicit Dense(TensorList tensors) {
    tensors_.reserve(tensors.size());
    for (const Tensor& tensor : tensors) tensors_.push_back(tensor.dim() == 2 ? dense_weight(tensor) : tensor.contiguous());
  }
  const Tensor& operator[](int64_t i) const { return tensors_[i]; }
  template <typename T>
  const T* data(int64_t i) const {
    return tensors_.empty() ? nullptr : static_cast<const T*>(tensors_[i].const_data_ptr());
  }

 private:
  std::vector<Tensor> tensors_;
};

// Dense int32 tensors of the tree, and what goes with them.
struct Tree {
  Tensor context_lens, depths, ancestors, lookahead;
  int64_t num_offsets, window;
  double scale;
};

// Rows of heads [rows, stride] to the layer's cache, and attention over it to `output`.
template <typename T>
void write_and_attend_rows(
    const T* heads, int64_t queries, const Tensor& cache, int64_t layer, int64_t rows, const Tree& tree, T* output) {
  const int64_t batch = cache.size(2), kv_heads = cache.size(4), head_dim = cache.size(5), size = sizeof(T);
  const int64_t row = (queries + 2 * kv_heads) * head_dim;
  T* keys = static_cast<T*>(cache.mutable_data_ptr()) + layer * cache.stride(0);
  T* values = keys + cache.stride(1);
  const T* new_keys = heads + queries * head_dim;
  for (const bool of_keys : {true, false}) {
    const cpu::WriteCache args{
        .rows = reinterpret_cast<const char*>(of_keys ? new_keys : new_keys + kv_heads * head_dim),
        .rows_batch = rows * row * size,
        .rows_row = row * size,
        .rows_head = head_dim * size,
        .cache = reinterpret_cast<char*>(of_keys ? keys : values),
        .cache_batch = cache.stride(2) * size,
        .cache_slot = cache.stride(3) * size,
        .cache_head = cache.stride(4) * size,
        .context_lens = tree.context_lens.const_data_ptr<int32_t>(),
        .num_rows = rows,
        .heads = kv_heads,
        .head_bytes = head_dim * size,
    };
    for (int64_t b = 0; b < batch; ++b) cpu::write_cache(args, b);
  }
  const cpu::TreeAttention<T> args{
      .query = heads,
      .query_batch = rows * row,
      .query_row = row,
      .query_head = head_dim,
      .key = keys,
      .value = values,
      .key_batch = cache.stride(2),
      .key_slot = cache.stride(3),
      .key_head = cache.stride(4),
      .value_batch = cache.stride(2),
      .value_slot = cache.stride(3),
      .value_head = cache.stride(4),
      .output = output,
      .context_lens = tree.context_lens.const_data_ptr<int32_t>(),
      .depths = tree.depths.const_data_ptr<int32_t>(),
      .ancestors = tree.ancestors.const_data_ptr<int32_t>(),
      .lookahead = tree.lookahead.const_data_ptr<int32_t>(),
      .rows = rows,
      .num_nodes = tree.depths.size(1),
      .num_lookahead = tree.lookahead.size(1),
      .num_offsets = tree.num_offsets,
      .heads = queries,
      .kv_heads = kv_heads,
      .head_dim = head_dim,
      .window = tree.window,
      .scale = tree.scale,
  };
  attend_rows(args, batch);
}

// Input, cos and sin are dense; `output` takes what the last layer makes.
template <typename T>
void run(
    const Tensor& input, const Tensor& cos, const Tensor& sin, double eps, const Lists& lists, const Tensor& cache,
    const Tree& tree, Tensor& output) {
  const Dense norms(lists.norms), projections(lists.projections), biases(lists.biases), outputs(lists.outputs);
  const Dense output_biases(lists.output_biases), mlps(lists.mlps);
  const int64_t layers = cache.size(0), width = input.size(2), rows = input.size(0) * input.size(1);
  const int64_t kv_heads = cache.size(4), head_dim = cache.size(5);
  const T* cosines = static_cast<const T*>(cos.const_data_ptr());
  const T* sines = static_cast<const T*>(sin.const_data_ptr());
  const auto end = [&](int64_t i) {
    return LayerEnd<T>{
        .output = outputs[i],
        .gate = mlps[3 * i],
        .up = mlps[3 * i + 1],
        .down = mlps[3 * i + 2],
        .bias = output_biases.template data<T>(i),
        .norm = norms.template data<T>(2 * i + 1),
        .eps = eps,
    };
  };
  int64_t most_heads = 0, scratch = rows * width, floats = rows * cpu::prepared_width(width);
  for (int64_t i = 0; i < layers; ++i) {
    most_heads = std::max(most_heads, outputs[i].size(1));
    scratch = std::max(scratch, end(i).scratch(rows));
    floats = std::max(floats, end(i).floats(rows));
  }
  const Tensor memory = at::empty({scratch + rows * (2 * most_heads + 2 * kv_heads * head_dim)}, input.options());
  const Tensor prepared_memory = at::empty({floats}, input.options().dtype(at::kFloat));
  T* part = static_cast<T*>(memory.mutable_data_ptr());
  T* heads = part + scratch;
  T* attended = heads + rows * (most_heads + 2 * kv_heads * head_dim);
  float* prepared = prepared_memory.mutable_data_ptr<float>();
  T* hidden = static_cast<T*>(output.mutable_data_ptr());
  std::copy_n(static_cast<const T*>(input.const_data_ptr()), rows * width, hidden);
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t queries = projections[3 * i].size(0) / head_dim, stride = (queries + 2 * kv_heads) * head_dim;
    const float* ready =
        norm_rows(static_cast<const T*>(hidden), rows, norms.template data<T>(2 * i), width, eps, part, prepared);
    cpu::Linear<T> linears[3];
    T* to = heads;
    for (int64_t j = 0; j < 3; ++j) {
      const Tensor& weight = projections[3 * i + j];
      linears[j] = describe_linear<T>(ready, rows, weight, biases.template data<T>(3 * i + j), to, stride);
      to += weight.size(0);
    }
    joint_linear_rows<T>(linears);
    rotate_rows(heads, stride, rows, queries + kv_heads, cosines, sines, head_dim);
    write_and_attend_rows<T>(heads, queries, cache, i, input.size(1), tree, attended);
    layer_end_rows(end(i), static_cast<const T*>(attended), static_cast<const T*>(hidden), rows, part, prepared, hidden);
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
  const Lists lists{norms, projections, biases, outputs, output_biases, mlps};
  const size_t layers = cache.size(0);
  check_number("norms", norms, 2, layers, false);
  check_number("projections", projections, 3, layers, false);
  check_number("biases", biases, 3, layers, true);
  check_number("outputs", outputs, 1, layers, false);
  check_number("output_biases", output_biases, 1, layers, true);
  check_number("mlps", mlps, 3, layers, false);
  const int64_t batch = cache.size(2), head_dim = cache.size(5);
  check_shape("input", input, {batch, kAny, kAny});
  check_few_row_dtype("input", input);
  check_dtype("cache", cache, input.scalar_type());
  for (const auto& [name, part] : {std::pair<const char*, const Tensor&>{"cos", cos}, {"sin", sin}}) {
    check_part(name, part, {batch, input.size(1), head_dim}, input);
  }
  TORCH_CHECK_VALUE(head_dim > 0 && head_dim % 2 == 0, "cos: got head_dim ", head_dim, ", expected an even one");
  check_dense_slots("cache", cache, 1);
  for (size_t i = 0; i < layers; ++i) check_layer(lists, i, input, cache.size(4), head_dim);
  check_tree(batch, input.size(1), context_lens, depths, ancestors, lookahead, num_offsets, sliding_window);
  const Tree tree{
      .context_lens = context_lens.contiguous(),
      .depths = depths.contiguous(),
      .ancestors = ancestors.contiguous(),
      .lookahead = lookahead.contiguous(),
      .num_offsets = num_offsets,
      .window = sliding_window.value_or(0),
      .scale = scale,
  };
  check_tree_values(tree.context_lens, tree.lookahead, input.size(1), depths.size(1), cache.size(3));
  Tensor output = at::empty(input.sizes(), input.options().memory_format(at::MemoryFormat::Contiguous));
  const auto go = [&](auto number) {
    run<decltype(number)>(input.contiguous(), cos.contiguous(), sin.contiguous(), eps, lists, cache, tree, output);
  };
  input.scalar_type() == at::kFloat ? go(float{}) : go(cpu::bfloat16{});
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(firp, CPU, library) { library.impl("decoder_layers", decoder_layers); }

}  // namespace firp
