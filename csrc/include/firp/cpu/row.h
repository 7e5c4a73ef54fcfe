// What a decoder layer does with one row at a time, in the roundings of the model's own modules. A row's result does
// not depend on other rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "firp/cpu/isa.h"
#include "firp/cpu/number.h"
#include "firp/cpu/vector.h"

#define FIRP_KERNEL "firp/cpu/row_kernel.h"
#include "firp/cpu/for_each_isa.h"

namespace firp::cpu {

// output = weight * (input / sqrt(mean(input^2) + eps)), `width` elements.
template <typename T>
void rms_norm(Isa isa, const T* input, const T* weight, int64_t width, float eps, T* output) {
  FIRP_DISPATCH(rms_norm(input, weight, width, eps, output));
}

// row = row * cos + rotate_half(row) * sin, in place, `head_dim` elements.
template <typename T>
void rotary(Isa isa, T* row, const T* cos, const T* sin, int64_t head_dim) {
  FIRP_DISPATCH(rotary(row, cos, sin, head_dim));
}

// gate = silu(gate) * up, in place, `count` elements.
template <typename T>
void gate(Isa isa, T* gate, const T* up, int64_t count) {
  FIRP_DISPATCH(gate(gate, up, count));
}

// rows += others, `count` elements.
template <typename T>
void add(Isa isa, T* rows, const T* others, int64_t count) {
  FIRP_DISPATCH(add(rows, others, count));
}

}  // namespace firp::cpu
