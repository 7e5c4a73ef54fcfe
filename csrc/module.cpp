// The pybind11 module firp_kernels._C: what was built. Loading it registers the ops with torch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "firp/cpu/isa.h"

namespace {

std::map<std::string, std::vector<std::string>> registered_ops() {
  return {{"cpu", {FIRP_CPU_OPS}}, {"cuda", {FIRP_CUDA_OPS}}};
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler", __VERSION__},
      {"torch", FIRP_TORCH_VERSION},
      {"cuda", FIRP_CUDA_VERSION},
      {"cpu_instructions", firp::cpu::isa_name(firp::cpu::best_isa())},
  };
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled ops of firp_kernels.";
  module.def("registered_ops", &registered_ops, "Ops of this build, by device type.");
  module.def("build_info", &build_info, "Compiler, versions of torch and CUDA built for, instruction set in use.");
}
