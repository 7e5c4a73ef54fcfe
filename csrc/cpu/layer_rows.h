// What ops of half a layer share with those of its parts: a norm before linears, a gate between them.
#pragma once

#include "firp/cpu/row.h"
#include "linear_rows.h"

namespace firp {

// Dense rows of the width of `norm`, normed and then as the linears' kernel reads them.
template <typename T>
void norm_rows(const T* from, int64_t rows, const at::Tensor& norm, double eps, T* normed, float* prepared) {
  over_rows(rows, [&](int64_t first, int64_t last) {
    const cpu::Isa isa = cpu::best_isa();
    const T* scales = static_cast<const T*>(norm.const_data_ptr());
    const int64_t width = norm.size(0);
    for (int64_t r = first; r < last; ++r) {
      cpu::rms_norm(isa, from + r * width, scales, width, static_cast<float>(eps), normed + r * width);
    }
    cpu::prepare(isa, normed + first * width, width, last - first, width, prepared + first * cpu::prepared_width(width));
  });
}

// silu(gates) * ups in place of the gates.
template <typename T>
void gated_linear_rows(const cpu::Linear<T>& gates, const cpu::Linear<T>& ups) {
  over_outputs(gates.outputs, gates.width, [&](float* scratch, int64_t first, int64_t last) {
    const cpu::Isa isa = cpu::best_isa();
    cpu::linear(isa, gates, scratch, first, last);
    cpu::linear(isa, ups, scratch, first, last);
    for (int64_t r = 0; r < gates.rows; ++r) {
      cpu::gate(isa, gates.output + r * gates.outputs + first, ups.output + r * ups.outputs + first, last - first);
    }
  });
}

}  // namespace firp
