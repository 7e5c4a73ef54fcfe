// One instruction set's kernels of row.h; included with FIRP_ISA and FIRP_VECTOR_BYTES defined.

namespace firp::cpu::FIRP_ISA {

// work(i, count) for every vector of a row; `count` is below kLanes for what is left at the end.
template <typename Work>
static inline __attribute__((always_inline)) void over_vectors(int64_t size, const Work& work) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) work(i, std::integral_constant<int64_t, kLanes>{});
  if (i < size) work(i, size - i);
}

// `count` elements; zeros follow.
template <typename T, typename Count>
static inline __attribute__((always_inline)) Floats load_some(const T* from, Count count) {
  if constexpr (!std::is_same_v<Count, int64_t>) return load(from);
  T some[kLanes] = {};
  for (int64_t l = 0; l < count; ++l) some[l] = from[l];
  return load(some);
}

template <typename T, typename Count>
static inline __attribute__((always_inline)) void save_some(Floats values, T* to, Count count) {
  if constexpr (!std::is_same_v<Count, int64_t>) return save(values, to);
  T some[kLanes];
  save(values, some);
  for (int64_t l = 0; l < count; ++l) to[l] = some[l];
}

template <typename T>
void rms_norm(const T* input, const T* weight, int64_t width, float eps, T* output) {
  Floats squares = {};
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) squares += load(input + i) * load(input + i);
  float total = sum(squares);
  for (int64_t i = whole; i < width; ++i) total += to_float(input[i]) * to_float(input[i]);
  const Floats factor = broadcast(1.0f / std::sqrt(total / static_cast<float>(width) + eps));
  over_vectors(width, [&](int64_t i, auto count) __attribute__((always_inline)) {
    const Floats normed = rounded<T>(load_some(input + i, count) * factor);
    save_some(load_some(weight + i, count) * normed, output + i, count);
  });
}

template <typename T>
void rotary(T* row, const T* cos, const T* sin, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  T* other = row + half;
  over_vectors(half, [&](int64_t i, auto count) __attribute__((always_inline)) {
    const Floats low = load_some(row + i, count), high = load_some(other + i, count);
    const Floats low_cos = rounded<T>(low * load_some(cos + i, count));
    const Floats low_sin = rounded<T>(-high * load_some(sin + i, count));
    const Floats high_cos = rounded<T>(high * load_some(cos + half + i, count));
    const Floats high_sin = rounded<T>(low * load_some(sin + half + i, count));
    save_some(low_cos + low_sin, row + i, count);
    save_some(high_cos + high_sin, other + i, count);
  });
}

template <typename T>
void gate(T* gate, const T* up, int64_t size) {
  over_vectors(size, [&](int64_t i, auto count) __attribute__((always_inline)) {
    const Floats x = load_some(gate + i, count), zero = {};
    const Floats small = exponential(x < zero ? x : -x);
    const Floats silu = (x < zero ? x * small : x) / (broadcast(1.0f) + small);
    save_some(rounded<T>(silu) * load_some(up + i, count), gate + i, count);
  });
}

template <typename T>
void add(T* rows, const T* others, int64_t size) {
  over_vectors(size, [&](int64_t i, auto count) __attribute__((always_inline)) {
    save_some(load_some(rows + i, count) + load_some(others + i, count), rows + i, count);
  });
}

}  // namespace firp::cpu::FIRP_ISA
