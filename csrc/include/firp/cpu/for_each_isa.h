// Include the file FIRP_KERNEL once per instruction set, in namespaces portable, avx2 and avx512, each compiled for that
// set whatever the flags of the translation unit. No include guard: every kernel header includes it.

#define FIRP_ISA portable
#define FIRP_VECTOR_BYTES 16
#include FIRP_KERNEL
#undef FIRP_ISA
#undef FIRP_VECTOR_BYTES

#if defined(__x86_64__)
#define FIRP_ISA avx2
#define FIRP_VECTOR_BYTES 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include FIRP_KERNEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FIRP_ISA
#undef FIRP_VECTOR_BYTES

#define FIRP_ISA avx512
#define FIRP_VECTOR_BYTES 64
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,fma")
#endif
#include FIRP_KERNEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef FIRP_ISA
#undef FIRP_VECTOR_BYTES
#endif

#undef FIRP_KERNEL
