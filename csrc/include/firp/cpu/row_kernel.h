// One instruction set's kernels of row.h; included with FIRP_ISA and FIRP_VECTOR_BYTES defined. The plain loops are
// written for the compiler to vectorise.

namespace firp::cpu::FIRP_ISA {

template <typename T>
static inline __attribute__((always_inline)) float rounded(float value) {
  T stored;
  store(value, &stored);
  return to_float(stored);
}

template <typename T>
void rms_norm(const T* input, const T* weight, int64_t width, float eps, T* output) {
  float lanes[kLanes] = {};
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += to_float(input[i + l]) * to_float(input[i + l]);
  }
  float total = sum(load(lanes));
  for (int64_t i = whole; i < width; ++i) total += to_float(input[i]) * to_float(input[i]);
  const float factor = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
  for (int64_t i = 0; i < width; ++i) store(to_float(weight[i]) * rounded<T>(to_float(input[i]) * factor), output + i);
}

template <typename T>
void rotary(T* row, const T* cos, const T* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  T* other = row + half;
  for (int64_t i = 0; i < half; ++i) {
    const float low = to_float(row[i]), high = to_float(other[i]);
    const float low_cos = rounded<T>(low * to_float(cos[i])), low_sin = rounded<T>(-high * to_float(sin[i]));
    const float high_cos = rounded<T>(high * to_float(cos[half + i])), high_sin = rounded<T>(low * to_float(sin[half + i]));
    store(low_cos + low_sin, row + i);
    store(high_cos + high_sin, other + i);
  }
}

template <typename T>
static inline __attribute__((always_inline)) void gate_part(T* gate, const T* up, int64_t count) {
  float wide[kLanes] = {};
  for (int64_t l = 0; l < count; ++l) wide[l] = to_float(gate[l]);
  const Floats x = load(wide), zero = {};
  const Floats small = exponential(x < zero ? x : -x);
  save((x < zero ? x * small : x) / (broadcast(1.0f) + small), wide);
  for (int64_t l = 0; l < count; ++l) store(rounded<T>(wide[l]) * to_float(up[l]), gate + l);
}

template <typename T>
void gate(T* gate, const T* up, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) gate_part(gate + i, up + i, kLanes);
  if (i < count) gate_part(gate + i, up + i, count - i);
}

template <typename T>
void add(T* rows, const T* others, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(to_float(rows[i]) + to_float(others[i]), rows + i);
}

}  // namespace firp::cpu::FIRP_ISA
