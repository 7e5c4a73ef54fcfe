// What ops of half a layer, and of whole ones, share with those of their parts. Rows are dense unless said otherwise.
#pragma once

#include "firp/cpu/row.h"
#include "firp/cpu/tree_attention.h"
#include "linear_rows.h"

namespace firp {

// Compiled once, by tree_attention.cpp.
extern template void cpu::tree_attention(cpu::Isa, const cpu::TreeAttention<float>&, int64_t, int64_t, int64_t, int64_t);
extern template void cpu::tree_attention(
    cpu::Isa, const cpu::TreeAttention<cpu::bfloat16>&, int64_t, int64_t, int64_t, int64_t);

// Rows of `width` normed, and then as the linears' kernel reads them: in `normed` or in `prepared`.
template <typename T>
const float* norm_rows(const T* from, int64_t rows, const T* norm, int64_t width, double eps, T* normed, float* prepared) {
  const cpu::Rows<T> made{normed, width, rows, width};
  const bool as_they_are = cpu::lies_prepared(made);
  over_rows(rows, [&](int64_t first, int64_t last) {
    const cpu::Isa isa = cpu::best_isa();
    for (int64_t r = first; r < last; ++r) {
      cpu::rms_norm(isa, from + r * width, norm, width, static_cast<float>(eps), normed + r * width);
    }
    if (!as_they_are) cpu::prepare(isa, made, first, last, prepared);
  });
  return as_they_are ? reinterpret_cast<const float*>(normed) : prepared;
}

// silu(gates) * ups in place of the gates; the output of `ups` is scratch.
template <typename T>
void gated_linear_rows(const cpu::Linear<T>& gates, const cpu::Linear<T>& ups) {
  over_outputs(gates.outputs, gates.width, [&](float* scratch, int64_t begin, int64_t end) {
    over_blocks(gates, begin, end, [&](const cpu::Linear<T>& part, int64_t first, int64_t last) {
      const cpu::Isa isa = cpu::best_isa();
      cpu::Linear<T> others = ups;  // of these outputs alone, side by side
      others.prepared = part.prepared;
      others.weight += first * ups.weight_stride;
      others.output += begin * gates.rows;
      others.rows = part.rows;
      others.outputs = others.output_stride = last - first;
      cpu::linear(isa, part, scratch, first, last);
      cpu::linear(isa, others, scratch, 0, others.outputs);
      for (int64_t r = 0; r < part.rows; ++r) {
        cpu::gate(isa, part.output + r * part.outputs + first, others.output + r * others.outputs, others.outputs);
      }
    });
  });
}

// output += added, both dense, as the linear's outputs are made.
template <typename T>
void added_linear_rows(const cpu::Linear<T>& args, const T* added) {
  over_outputs(args.outputs, args.width, [&](float* scratch, int64_t first, int64_t last) {
    over_blocks(args, first, last, [&](const cpu::Linear<T>& part, int64_t first, int64_t last) {
      const cpu::Isa isa = cpu::best_isa();
      const T* others = added + (part.output - args.output);
      cpu::linear(isa, part, scratch, first, last);
      for (int64_t r = 0; r < part.rows; ++r) {
        cpu::add(isa, part.output + r * part.outputs + first, others + r * part.outputs + first, last - first);
      }
    });
  });
}

// Rows `stride` apart; cos and sin are [rows, head_dim].
template <typename T>
void rotate_rows(T* heads, int64_t stride, int64_t rows, int64_t rotated, const T* cos, const T* sin, int64_t head_dim) {
  over_rows(rows, [&](int64_t first, int64_t last) {
    const cpu::Isa isa = cpu::best_isa();
    for (int64_t r = first; r < last; ++r) {
      for (int64_t h = 0; h < rotated; ++h) {
        cpu::rotary(isa, heads + r * stride + h * head_dim, cos + r * head_dim, sin + r * head_dim, head_dim);
      }
    }
  });
}

// A thread takes neighbouring rows, so that few heads have their keys and values laid out by more than one.
template <typename T>
void attend_rows(const cpu::TreeAttention<T>& args, int64_t batch) {
  const cpu::Isa isa = cpu::best_isa();
  at::parallel_for(0, batch * args.kv_heads * args.rows, 1, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t pair = first / args.rows, row = first % args.rows, rows = std::min(args.rows - row, last - first);
      cpu::tree_attention(isa, args, pair / args.kv_heads, pair % args.kv_heads, row, row + rows);
      first += rows;
    }
  });
}

// The weights of a layer's end, whose last dimensions are dense, and their norm; `bias` may be null.
template <typename T>
struct LayerEnd {
  const at::Tensor &output, &gate, &up, &down;
  const T* bias;
  const T* norm;
  double eps;

  // Elements of T and floats of scratch.
  int64_t scratch(int64_t rows) const { return 2 * rows * (output.size(0) + gate.size(0)); }
  int64_t floats(int64_t rows) const {
    return rows * cpu::prepared_width(std::max({output.size(0), output.size(1), gate.size(0)}));
  }
};

// residual + attended @ output^T + bias, and to that the gated MLP of its norm, to `result`.
template <typename T>
void layer_end_rows(
    const LayerEnd<T>& weights, const T* attended, const T* residual, int64_t rows, T* scratch, float* prepared, T* result) {
  const int64_t inputs = weights.output.size(1), width = weights.output.size(0), wide = weights.gate.size(0);
  T* hidden = scratch;
  T* normed = hidden + rows * width;
  T* gates = normed + rows * width;
  T* ups = gates + rows * wide;
  const float* ready = prepare_rows(cpu::Rows<T>{attended, inputs, rows, inputs}, prepared);
  added_linear_rows(describe_linear<T>(ready, rows, weights.output, weights.bias, hidden, width), residual);
  ready = norm_rows(hidden, rows, weights.norm, width, weights.eps, normed, prepared);
  gated_linear_rows(
      describe_linear<T>(ready, rows, weights.gate, nullptr, gates, wide),
      describe_linear<T>(ready, rows, weights.up, nullptr, ups, wide));
  ready = prepare_rows(cpu::Rows<T>{gates, wide, rows, wide}, prepared);
  added_linear_rows(describe_linear<T>(ready, rows, weights.down, nullptr, result, width), static_cast<const T*>(hidden));
}

}  // namespace firp
