// Vector types of every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "firp/cpu/number.h"

namespace firp::cpu {

// As many as the widest vector has.
constexpr int32_t kLaneNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

}  // namespace firp::cpu

#define FIRP_KERNEL "firp/cpu/vector_kernel.h"
#include "firp/cpu/for_each_isa.h"
