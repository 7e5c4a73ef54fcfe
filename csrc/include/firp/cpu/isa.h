// Instruction sets the CPU kernels are compiled for, and the choice among them at run time.
//
// A kernel file is compiled once per set by for_each_isa.h: the same source with vectors of another width. Nothing under
// include/ knows torch. Sets are ordered: each includes those before it.
#pragma once

#include <cstdlib>
#include <cstring>

namespace firp::cpu {

enum class Isa { portable, avx2, avx512, avx512_bf16 };

inline const char* isa_name(Isa isa) {
  constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(isa)];
}

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
    const bool dot = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl");
    return dot ? Isa::avx512_bf16 : Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

inline Isa best_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

}  // namespace firp::cpu
