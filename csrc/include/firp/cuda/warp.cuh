// The warp that a kernel is written against. Its work is a sequence of phases; within a phase the lanes know nothing of
// each other, and every lane has finished one before any starts the next. Code between phases runs alike in all lanes.
//
// The algorithms are templates over the warp, so that csrc/tests/host_warp.h can run them lane by lane without a GPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FIRP_DEVICE __device__ inline
#else
#define FIRP_DEVICE inline
#endif

namespace firp::cuda {

constexpr int32_t kLanes = 32;

// A float's place in the order of all floats, as an unsigned key; 0 stands below all of them.
FIRP_DEVICE uint32_t order_key(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Candidate {
  uint32_t key;
  int32_t index;
};

// One rounding each: never part of a fused multiply-add.
FIRP_DEVICE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FIRP_DEVICE float subtract(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

#if defined(__CUDACC__)
struct Warp {
  template <typename Phase>
  __device__ void each(const Phase& phase) const {
    __syncwarp();
    phase(static_cast<int32_t>(threadIdx.x));
    __syncwarp();
  }

  // The candidate of largest key among the lanes, the lowest index among equals.
  template <typename Phase>
  __device__ Candidate largest(const Phase& phase) const {
    __syncwarp();
    const Candidate own = phase(static_cast<int32_t>(threadIdx.x));
    const uint32_t key = __reduce_max_sync(0xffffffffu, own.key);
    const uint32_t index = __reduce_min_sync(0xffffffffu, own.key == key ? static_cast<uint32_t>(own.index) : 0x7fffffffu);
    __syncwarp();
    return {key, static_cast<int32_t>(index)};
  }
};
#endif

}  // namespace firp::cuda
