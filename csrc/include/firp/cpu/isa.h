// Instruction sets the CPU kernels are compiled for, and the choice among them at run time.
//
// A kernel file is included once per set through FIRP_FOR_EACH_ISA-style blocks (see linear.h): the same source with
// vectors of another width. Nothing here knows torch.
#pragma once

#include <cstdlib>
#include <cstring>

namespace firp::cpu {

enum class Isa { portable, avx2, avx512 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

inline Isa best_isa() {
  static const Isa isa = detect_isa();
  return isa;
}

}  // namespace firp::cpu
