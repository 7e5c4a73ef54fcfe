// Storage types of the CPU kernels and their float values.
#pragma once

#include <cstdint>
#include <cstring>

namespace firp::cpu {

using float16 = _Float16;

struct bfloat16 {
  uint16_t bits;
};

inline float to_float(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

inline float to_float(float16 value) { return static_cast<float>(value); }
inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }

inline void store(float value, float* out) { *out = value; }
inline void store(double value, double* out) { *out = value; }
inline void store(float value, float16* out) { *out = static_cast<float16>(value); }

// Round to nearest, ties to even; NaN stays NaN.
inline void store(float value, bfloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  out->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace firp::cpu
