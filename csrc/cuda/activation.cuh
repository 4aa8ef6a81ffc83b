// Activations on the device: f' and the inverse (bpfree_kernels/activations.py has the table of them).
#pragma once

#include <cuda_runtime.h>

#include <cmath>

#include "../activation.h"

namespace bpfree::cuda {

template <class T>
__device__ inline T derivative(Activation kind, T z, T slope) {
  switch (kind) {
    case Activation::identity: return T(1);
    case Activation::relu: return z > T(0) ? T(1) : T(0);
    case Activation::leaky_relu: return z > T(0) ? T(1) : slope;
    case Activation::tanh: {
      const T y = std::tanh(z);
      return T(1) - y * y;
    }
    case Activation::sigmoid: {
      const T y = T(1) / (T(1) + std::exp(-z));
      return y * (T(1) - y);
    }
    case Activation::hardtanh: return std::abs(slope * z) <= T(1) ? slope : T(0);
    case Activation::sign: return T(0);
  }
  return T(0);
}

// f^-1(y) of an activation that has one, identity or leaky_relu with 1 / slope: a division costs a call.
template <class T>
__device__ inline T inverse_activation(Activation kind, T y, T inverse_slope) {
  return kind == Activation::identity || y > T(0) ? y : y * inverse_slope;
}

}  // namespace bpfree::cuda
