// Exponential functions on vectors, within a few units in the last place, NaN in NaN out.
#pragma once

#include "vec.h"

namespace bpfree::cpu::BPFREE_ISA {

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int kTerms = 7, kMantissa = 23, kBias = 127;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLimit = 87.0f;  // e^-limit is still a normal number
  static constexpr int kLogTerms = 8;
};
template <>
struct ExpConstants<double> {
  static constexpr int kTerms = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kLimit = 708.0;
  static constexpr int kLogTerms = 17;
};

template <class T>
inline Vec<T> vabs(Vec<T> x) {
  const Vec<T> sign = splat<T>(T(-0.0));
  return (Vec<T>)((VecBits<T>)x & ~(VecBits<T>)sign);
}

// |y| with the sign of x, zeros included.
template <class T>
inline Vec<T> with_sign(Vec<T> y, Vec<T> x) {
  const VecBits<T> sign = (VecBits<T>)splat<T>(T(-0.0));
  return (Vec<T>)(((VecBits<T>)y & ~sign) | ((VecBits<T>)x & sign));
}

template <class T>
inline Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return a < b ? b : a;  // keeps a NaN in a
}

// Scalar functions by type, as builtins: no header, so no inline function that could leak out.
inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }
inline float exponential(float x) { return __builtin_expf(x); }
inline double exponential(double x) { return __builtin_exp(x); }
inline float natural_log(float x) { return __builtin_logf(x); }
inline double natural_log(double x) { return __builtin_log(x); }

template <class T>
inline Vec<T> vsqrt(Vec<T> x) {
  Vec<T> y;
  for (int i = 0; i < kLanes<T>; ++i) y[i] = root(x[i]);  // one instruction, without errno
  return y;
}

// e^x = power (1 + rest) for |x| <= kLimit, with rest = e^r - 1 to full relative accuracy.
template <class T>
struct Exp {
  Vec<T> power;
  Vec<T> rest;
};

template <class T>
inline Exp<T> split_exp(Vec<T> x) {
  using C = ExpConstants<T>;
  const T log2e = T(1.44269504088896340736);
  const Vec<T> shifted = x * log2e + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const VecBits<T> exponent = (VecBits<T>)shifted - (VecBits<T>)splat<T>(C::kRound);
  const Vec<T> r = (x - n * C::kLn2High) - n * C::kLn2Low;
  // e^r - 1 = r (1 + r/2 (1 + r/3 (1 + ...))), the Taylor series in Horner form; |r| <= ln(2) / 2.
  Vec<T> series = splat<T>(T(1));
  for (int k = C::kTerms; k >= 2; --k) series = T(1) + (r * T(1.0 / k)) * series;
  return {(Vec<T>)((exponent + C::kBias) << C::kMantissa), r * series};
}

// e^x; 0 below -kLimit, and x must not exceed kLimit.
template <class T>
inline Vec<T> vexp(Vec<T> x) {
  const T limit = ExpConstants<T>::kLimit;
  const Exp<T> e = split_exp<T>(vmax<T>(x, splat<T>(-limit)));
  const Vec<T> y = e.power + e.power * e.rest;
  return x < -limit ? Vec<T>{} : y;
}

// tanh x = -q / (2 + q) with q = e^(-2|x|) - 1: no cancellation near 0, exactly 1 once q rounds to -1.
template <class T>
inline Vec<T> vtanh(Vec<T> x) {
  const Exp<T> e = split_exp<T>(vmax<T>(T(-2) * vabs<T>(x), splat<T>(-ExpConstants<T>::kLimit)));
  const Vec<T> q = e.power * e.rest + (e.power - T(1));
  return with_sign<T>(q / (q + T(2)), x);
}

template <class T>
inline Vec<T> vsigmoid(Vec<T> x) {
  const Vec<T> e = vexp<T>(-vabs<T>(x));
  const Vec<T> small = e / (T(1) + e);
  // 1 / (1 + e) rather than 1 - small: both sides keep their relative accuracy.
  return x < T(0) ? small : T(1) / (T(1) + e);
}

// log(1 + x) for x in [0, 1]: 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...) with s = x / (2 + x) <= 1/3.
template <class T>
inline Vec<T> vlog1p(Vec<T> x) {
  const Vec<T> s = x / (x + T(2)), square = s * s;
  Vec<T> series = {};
  for (int k = ExpConstants<T>::kLogTerms; k >= 0; --k) series = series * square + T(1.0 / (2 * k + 1));
  return T(2) * s * series;
}

}  // namespace bpfree::cpu::BPFREE_ISA
