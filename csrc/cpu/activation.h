// Activations: f(z) and f'(z) of a vector (bpfree_kernels/activations.py has the table of them).
#pragma once

#include "kernels.h"
#include "math.h"

namespace bpfree::cpu::BPFREE_ISA {

template <class T>
struct Activated {
  Vec<T> value;
  Vec<T> derivative;
};

template <Activation kind, class T>
inline Activated<T> activate(Vec<T> z, T slope) {
  const Vec<T> zero = {}, one = splat<T>(T(1));
  if constexpr (kind == Activation::identity) {
    return {z, one};
  } else if constexpr (kind == Activation::relu) {
    return {vmax<T>(z, zero), z > zero ? one : zero};
  } else if constexpr (kind == Activation::leaky_relu) {
    const Vec<T> gain = z > zero ? one : splat<T>(slope);
    return {z * gain, gain};
  } else if constexpr (kind == Activation::tanh) {
    const Vec<T> y = vtanh<T>(z);
    return {y, one - y * y};
  } else if constexpr (kind == Activation::sigmoid) {
    const Vec<T> y = vsigmoid<T>(z);
    return {y, y * (one - y)};
  } else if constexpr (kind == Activation::hardtanh) {
    const Vec<T> s = z * slope;
    const Vec<T> clipped = s > one ? one : s < -one ? -one : s;
    return {clipped, vabs<T>(s) <= one ? splat<T>(slope) : zero};
  } else {
    const Vec<T> signum = z > zero ? one : z < zero ? -one : z;  // keeps NaN
    return {signum, zero};
  }
}

// Calls f with the activation as a compile-time constant, so that loops inside f carry no branch.
template <class F>
inline void with_activation(Activation kind, F&& f) {
  switch (kind) {
    case Activation::identity: return f.template operator()<Activation::identity>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::leaky_relu: return f.template operator()<Activation::leaky_relu>();
    case Activation::tanh: return f.template operator()<Activation::tanh>();
    case Activation::sigmoid: return f.template operator()<Activation::sigmoid>();
    case Activation::hardtanh: return f.template operator()<Activation::hardtanh>();
    case Activation::sign: return f.template operator()<Activation::sign>();
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
