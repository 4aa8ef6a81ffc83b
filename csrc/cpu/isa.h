// Which instruction set the CPU kernels use. They are compiled once per set; this picks one at run time.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace bpfree::cpu {

enum class Isa { baseline, avx2, avx512 };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

// The widest set that this CPU and operating system support.
inline Isa widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// The set that runs: the widest one, or a narrower one named in BPFREE_CPU_ISA (to test its kernels).
inline Isa chosen_isa() {
  static const Isa isa = [] {
    const Isa widest = widest_isa();
    const char* wanted = std::getenv("BPFREE_CPU_ISA");
    if (wanted == nullptr) return widest;
    for (const Isa narrower : {Isa::baseline, Isa::avx2}) {
      if (narrower < widest && std::strcmp(wanted, isa_name(narrower)) == 0) return narrower;
    }
    return widest;
  }();
  return isa;
}

}  // namespace bpfree::cpu
