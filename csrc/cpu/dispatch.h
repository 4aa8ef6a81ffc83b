// The kernels that run on this machine.
#pragma once

#include "isa.h"
#include "kernels.h"

namespace bpfree::cpu {

template <class T>
const Kernels<T>& kernels() {
#if defined(__x86_64__)
  switch (chosen_isa()) {
    case Isa::avx512: return avx512::table<T>();
    case Isa::avx2: return avx2::table<T>();
    default: break;
  }
#endif
  return baseline::table<T>();
}

}  // namespace bpfree::cpu
