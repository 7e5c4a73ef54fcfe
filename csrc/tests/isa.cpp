// FIRP_CPU_ISA is a cap on what the processor has; a value that is no set is named beside those that are.
#include "firp/cpu/isa.h"

#include "test.h"

int main() {
  using namespace firp;
  const cpu::Isa sets[] = {cpu::Isa::portable, cpu::Isa::avx2, cpu::Isa::avx512, cpu::Isa::avx512_bf16, cpu::Isa::amx};
  for (const cpu::Isa detected : sets) {
    CHECK(cpu::capped_isa(detected, nullptr) == detected);
    for (const cpu::Isa cap : sets) {
      CHECK(cpu::capped_isa(detected, cpu::isa_name(cap)) == (cap < detected ? cap : detected), cpu::isa_name(cap));
    }
  }
  for (const char* wrong : {"", "AVX2", "avx2 ", "avx512_bf16", "sse"}) {
    std::string problem;
    try {
      cpu::capped_isa(cpu::Isa::avx2, wrong);
    } catch (const std::invalid_argument& error) {
      problem = error.what();
    }
    const std::string expected = "', expected one of portable, avx2, avx512, avx512bf16, amx";
    CHECK(problem == "FIRP_CPU_ISA: got '" + std::string(wrong) + expected, problem);
  }
}
