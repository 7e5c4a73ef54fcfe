// Vectors of one instruction set, for the kernel files that are compiled once per set; included with FIRP_ISA and
// FIRP_VECTOR_BYTES defined, before each of them.

namespace firp::cpu::FIRP_ISA {

constexpr int64_t kLanes = FIRP_VECTOR_BYTES / 4;

typedef float Floats __attribute__((vector_size(FIRP_VECTOR_BYTES)));
typedef float LooseFloats __attribute__((vector_size(FIRP_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(FIRP_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(FIRP_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(FIRP_VECTOR_BYTES / 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(FIRP_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(FIRP_VECTOR_BYTES), aligned(2), may_alias));

// One rounding, in every tile alike: a compiler left to contract a * b + c by itself may not treat all tiles the same.
static inline __attribute__((always_inline)) Floats fused(Floats a, Floats b, Floats c) {
#if defined(__x86_64__) && FIRP_VECTOR_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__x86_64__) && FIRP_VECTOR_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

typedef float Quad __attribute__((vector_size(16)));
typedef float LooseQuad __attribute__((vector_size(16), aligned(4), may_alias));

// The lanes folded to four; `sum` and `sums_of_four` go on from there in the same order.
static inline __attribute__((always_inline)) Quad fold(Floats values) {
  Quad quads[kLanes / 4];
  std::memcpy(quads, &values, sizeof(values));
  for (int64_t half = kLanes / 8; half >= 1; half /= 2) {
    for (int64_t i = 0; i < half; ++i) quads[i] += quads[i + half];
  }
  return quads[0];
}

static inline __attribute__((always_inline)) float sum(Floats values) {
  const Quad quad = fold(values);
  return (quad[0] + quad[2]) + (quad[1] + quad[3]);
}

static inline __attribute__((always_inline)) Floats broadcast(float value) { return value - Floats{}; }

static inline __attribute__((always_inline)) Floats load(const float* from) {
  return *reinterpret_cast<const LooseFloats*>(from);
}

static inline __attribute__((always_inline)) Floats load(const bfloat16* from) {
#if defined(__x86_64__) && FIRP_VECTOR_BYTES == 64
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
#else
  return reinterpret_cast<Floats>(__builtin_convertvector(*reinterpret_cast<const LooseHalves*>(from), Words) << 16);
#endif
}

// 0, 1, 2, ...
static inline __attribute__((always_inline)) Integers lane_numbers() {
  Integers lanes;
  std::memcpy(&lanes, kLaneNumbers, sizeof(lanes));
  return lanes;
}

static inline __attribute__((always_inline)) void save(Floats values, float* to) {
  *reinterpret_cast<LooseFloats*>(to) = values;
}

// The bits of bfloat16 values, as `store` rounds them.
static inline __attribute__((always_inline)) Words narrowed(Floats values) {
  const Words bits = reinterpret_cast<Words>(values);
  return values != values ? Words{} + 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static inline __attribute__((always_inline)) void save(Floats values, bfloat16* to) {
#if defined(__x86_64__) && FIRP_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)narrowed(values)));
#else
  *reinterpret_cast<LooseHalves*>(to) = __builtin_convertvector(narrowed(values), Halves);
#endif
}

// As it would come back from a T.
template <typename T>
static inline __attribute__((always_inline)) Floats rounded(Floats values) {
  if constexpr (std::is_same_v<T, bfloat16>) return reinterpret_cast<Floats>(narrowed(values) << 16);
  return values;
}

// exp for x <= 0, to about one unit in the last place; below -87 as at -87. NaN stays NaN.
// Range reduction and polynomial: Cephes expf (S. Moshier).
static inline __attribute__((always_inline)) Floats exponential(Floats x) {
  const Floats lowest = broadcast(-87.0f), magic = broadcast(12582912.0f);
  x = x < lowest ? lowest : x;
  const Floats shifted = fused(x, broadcast(1.44269504088896341f), magic), n = shifted - magic;
  Floats r = fused(n, broadcast(-0.693359375f), x);
  r = fused(n, broadcast(2.12194440e-4f), r);
  Floats p = fused(broadcast(1.9875691500e-4f), r, broadcast(1.3981999507e-3f));
  p = fused(p, r, broadcast(8.3334519073e-3f));
  p = fused(p, r, broadcast(4.1665795894e-2f));
  p = fused(p, r, broadcast(1.6666665459e-1f));
  p = fused(p, r, broadcast(5.0000001201e-1f));
  p = fused(p, r * r, r) + broadcast(1.0f);
  return reinterpret_cast<Floats>(reinterpret_cast<Words>(p) + (reinterpret_cast<Words>(shifted) << 23));
}

}  // namespace firp::cpu::FIRP_ISA
