// What the library can say about its build and this machine's processor, for backends and the doctor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <thread>

#include "cpu/isa.h"

namespace {

std::map<std::string, std::string> build() {
  return {
      {"compiler", BPFREE_COMPILER},
      {"torch", BPFREE_TORCH_VERSION},
      {"torch_abi", BPFREE_TORCH_ABI},
      {"sanitizers", BPFREE_SANITIZERS},
  };
}

// Of the CUDA extension that was built beside this module: "none" if none was.
std::map<std::string, std::string> cuda_build() {
  return {{"nvcc", BPFREE_NVCC}, {"architectures", BPFREE_CUDA_ARCHITECTURES}};
}

std::map<std::string, std::string> processor() {
  return {
      {"widest", bpfree::cpu::isa_name(bpfree::cpu::widest_isa())},
      {"chosen", bpfree::cpu::isa_name(bpfree::cpu::chosen_isa())},
      {"cores", std::to_string(std::thread::hardware_concurrency())},
  };
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "How the extension was built, and what this processor can do.";
  module.def("build", &build, "Compiler, torch version and stable-ABI target of this build.");
  module.def("cuda_build", &cuda_build, "Compiler and architectures of the CUDA extension.");
  module.def("processor", &processor,
             "Widest instruction set of this processor, the one that the kernels use, and its cores.");
}
