// Vector types of every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FIRP_KERNEL "firp/cpu/vector_kernel.h"
#include "firp/cpu/for_each_isa.h"
