// Include the file FIRP_KERNEL once per instruction set, in namespaces portable, avx2 and avx512; where they are defined,
// FIRP_DOT_KERNEL in avx512_bf16, the set that multiplies bfloat16 pairs, and FIRP_TILE_KERNEL in amx, the one that
// multiplies tiles of them. No include guard: every kernel header includes this file.
#include "firp/cpu/isa.h"

#define FIRP_ISA portable
#define FIRP_VECTOR_BYTES 16
#include FIRP_KERNEL
#undef FIRP_ISA
#undef FIRP_VECTOR_BYTES

#if defined(__x86_64__)
#define FIRP_ISA avx2
#define FIRP_VECTOR_BYTES 32
FIRP_TARGET_BEGIN("avx2,fma")
#include FIRP_KERNEL
FIRP_TARGET_END
#undef FIRP_ISA
#undef FIRP_VECTOR_BYTES

#define FIRP_ISA avx512
#define FIRP_VECTOR_BYTES 64
FIRP_TARGET_BEGIN("avx512f,avx512bw,fma")
#include FIRP_KERNEL
FIRP_TARGET_END
#undef FIRP_ISA
#undef FIRP_VECTOR_BYTES

#if defined(FIRP_DOT_KERNEL)
FIRP_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512bf16")
#include FIRP_DOT_KERNEL
FIRP_TARGET_END
#endif

#if defined(FIRP_TILE_KERNEL)
FIRP_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")
#include FIRP_TILE_KERNEL
FIRP_TARGET_END
#endif
#endif

#undef FIRP_KERNEL
#undef FIRP_DOT_KERNEL
#undef FIRP_TILE_KERNEL
