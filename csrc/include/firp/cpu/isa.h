// Instruction sets the CPU kernels are compiled for, and the choice among them at run time.
//
// A kernel file is compiled once per set by for_each_isa.h: the same source with vectors of another width. Nothing under
// include/ knows torch. Sets are ordered: each includes those before it.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Functions between FIRP_TARGET_BEGIN("avx2,fma") and FIRP_TARGET_END are compiled for these instructions, for any flags
// of the translation unit.
#define FIRP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FIRP_TARGET_BEGIN(set) FIRP_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define FIRP_TARGET_END FIRP_PRAGMA(clang attribute pop)
#else
#define FIRP_TARGET_BEGIN(set) FIRP_PRAGMA(GCC push_options) FIRP_PRAGMA(GCC target(set))
#define FIRP_TARGET_END FIRP_PRAGMA(GCC pop_options)
#endif

// Returns `call` of the kernel for `isa`. FIRP_DISPATCH_DOT: of a kernel that has a set of its own for T = bfloat16.
// FIRP_DISPATCH_TILE: of one that has two.
#if defined(__x86_64__)
#define FIRP_DISPATCH(call)                    \
  if (isa >= Isa::avx512) return avx512::call; \
  if (isa == Isa::avx2) return avx2::call;     \
  return portable::call
#define FIRP_DISPATCH_DOT(call)                            \
  if constexpr (std::is_same_v<T, bfloat16>) {             \
    if (isa >= Isa::avx512_bf16) return avx512_bf16::call; \
  }                                                        \
  FIRP_DISPATCH(call)
#define FIRP_DISPATCH_TILE(call)               \
  if constexpr (std::is_same_v<T, bfloat16>) { \
    if (isa == Isa::amx) return amx::call;     \
  }                                            \
  FIRP_DISPATCH_DOT(call)
#else
#define FIRP_DISPATCH(call) return portable::call
#define FIRP_DISPATCH_DOT(call) FIRP_DISPATCH(call)
#define FIRP_DISPATCH_TILE(call) FIRP_DISPATCH(call)
#endif

namespace firp::cpu {

enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

// As FIRP_CPU_ISA takes them and firp_kernels.cpu_isa returns them.
inline const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
  return names[static_cast<int>(isa)];
}

#if defined(__x86_64__)
// Linux gives a process room for tiles only when it asks; it refuses where a signal stack would be too small for them.
inline bool has_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA of asm/prctl.h
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
      syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
    const bool dot = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl");
    if (!dot) return Isa::avx512;
    return has_tiles() ? Isa::amx : Isa::avx512_bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

// The best set that the processor has and `cap`, the value of FIRP_CPU_ISA or null, allows.
inline Isa capped_isa(Isa detected, const char* cap) {
  if (!cap) return detected;
  std::string expected;
  for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
    if (std::strcmp(isa_name(isa), cap) == 0) return std::min(detected, isa);
    expected += std::string(expected.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("FIRP_CPU_ISA: got '" + std::string(cap) + "', expected one of " + expected);
}

// A value of FIRP_CPU_ISA that is none throws, at this call and the next.
inline Isa best_isa() {
  static const Isa isa = capped_isa(detect_isa(), std::getenv("FIRP_CPU_ISA"));
  return isa;
}

}  // namespace firp::cpu
