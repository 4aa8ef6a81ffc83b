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

// tanh(z + d) - tanh z without cancellation: for z >= 0, with A = e^(-2z) and B = e^(-2|d|),
//   d > 0:   2 A (1 - B) / ((1 + A) (1 + A B))        d < 0:  -2 A (1 - B) / ((1 + A) (A + B))
// and for z < 0 that of -z and -d, negated. Two exponentials and one division.
template <class T>
inline Vec<T> tanh_difference(Vec<T> z, Vec<T> d) {
  const T limit = ExpConstants<T>::kLimit, flat = T(30);  // tanh is 1 from there on, and A far from underflow
  const Vec<T> zero = {}, one = splat<T>(T(1)), size = vabs<T>(z);
  const VecBits<T> negative = (VecBits<T>)z & (VecBits<T>)splat<T>(T(-0.0));
  const Vec<T> from = size > flat ? splat<T>(flat) : size, signed_d = (Vec<T>)((VecBits<T>)d ^ negative);
  const Vec<T> step = size > flat ? (size + signed_d) - flat : signed_d;  // z + d stays what it is
  const Exp<T> a = split_exp<T>(T(-2) * from);
  const Exp<T> b = split_exp<T>(vmax<T>(T(-2) * vabs<T>(step), splat<T>(-limit)));
  const Vec<T> A = a.power + a.power * a.rest, B = b.power + b.power * b.rest;
  const Vec<T> missing = b.power * b.rest + (b.power - T(1));  // B - 1
  const Vec<T> rising = size > flat ? zero : A;  // nothing is left to rise there
  const Vec<T> below = (one + A) * (step > zero ? one + A * B : A + B);
  const Vec<T> change = with_sign<T>(T(2) * (step > zero ? rising : A) * missing / below, step);
  return (Vec<T>)((VecBits<T>)change ^ negative);
}

// f(z + d) - f(z) without the digits that subtracting two close values would lose.
template <Activation kind, class T>
inline Vec<T> difference(Vec<T> z, Vec<T> d, T slope) {
  const Vec<T> zero = {}, one = splat<T>(T(1)), after = z + d;
  if constexpr (kind == Activation::identity) {
    return d;
  } else if constexpr (kind == Activation::relu || kind == Activation::leaky_relu) {
    const T low = kind == Activation::relu ? T(0) : slope;
    const Vec<T> crosses = (after > zero ? after : low * after) - (z > zero ? z : low * z);
    const Vec<T> from_on = after > zero ? d : crosses, from_off = after <= zero ? low * d : crosses;
    return z > zero ? from_on : z <= zero ? from_off : crosses;  // the last is for NaN
  } else if constexpr (kind == Activation::tanh) {
    return tanh_difference<T>(z, d);
  } else if constexpr (kind == Activation::sigmoid) {  // sigmoid z = (1 + tanh(z / 2)) / 2
    return T(0.5) * tanh_difference<T>(T(0.5) * z, T(0.5) * d);
  } else if constexpr (kind == Activation::hardtanh) {
    // Outside the bounds f(z) lies off slope z, and the step first has to make up for that; then it is cut
    // off where it reaches a bound. (Inside, off is 0: a fused multiply-add would give a rounding error.)
    const Vec<T> s = slope * z, y = activate<kind, T>(z, slope).value;
    const Vec<T> off = vabs<T>(s) <= one ? zero : s - y;
    const Vec<T> step = off + slope * d, up = one - y, down = -one - y;
    return step > up ? up : step < down ? down : step;
  } else {
    return activate<kind, T>(after, slope).value - activate<kind, T>(z, slope).value;
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
