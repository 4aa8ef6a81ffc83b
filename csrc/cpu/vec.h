// Vectors of the instruction set that this translation unit is compiled for, by GCC/Clang's vector
// extension: the same source serves AVX-512, AVX2, SSE2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef BPFREE_ISA
#error "vec.h belongs to the kernels that are compiled per instruction set (isa_kernels.cpp)"
#endif

namespace bpfree::cpu::BPFREE_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kVectorRegisters = 16;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 16;
#endif

template <class T>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecTraits<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VecTraits<T>::type;
template <class T>
using VecBits = typename VecTraits<T>::bits;
template <class T>
inline constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// The first `count` lanes of a vector, as loads and stores want them.
template <class T>
struct FirstLanes {
#if defined(__AVX512F__)
  std::conditional_t<sizeof(T) == 4, __mmask16, __mmask8> bits;
  explicit FirstLanes(int64_t count) : bits((1u << count) - 1) {}
#else
  int64_t count;
  explicit FirstLanes(int64_t count) : count(count) {}
#endif
};

// These elements, zeros behind them; the others are not touched.
template <class T>
inline Vec<T> load(const T* from, FirstLanes<T> first) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(first.bits, from);
  } else {
    return _mm512_maskz_loadu_pd(first.bits, from);
  }
#else
  if (first.count == kLanes<T>) return load(from);
  Vec<T> v = {};
  std::memcpy(&v, from, static_cast<size_t>(first.count) * sizeof(T));
  return v;
#endif
}

template <class T>
inline void store(T* to, Vec<T> v, FirstLanes<T> first) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, first.bits, v);
  } else {
    _mm512_mask_storeu_pd(to, first.bits, v);
  }
#else
  if (first.count == kLanes<T>) return store(to, v);
  std::memcpy(to, &v, static_cast<size_t>(first.count) * sizeof(T));
#endif
}

// A vector's worth of bytes as whole numbers. (GCC takes __builtin_convertvector apart lane by lane here.)
template <class T>
inline VecBits<T> widen(const uint8_t* from) {
#if defined(__AVX512F__)
  __m128i bytes = {};
  std::memcpy(&bytes, from, kLanes<T>);
  // masked, since GCC warns of the undefined value that it has the others begin with
  return sizeof(T) == 4 ? (VecBits<T>)_mm512_maskz_cvtepu8_epi32(0xffff, bytes)
                        : (VecBits<T>)_mm512_maskz_cvtepu8_epi64(0xff, bytes);
#elif defined(__AVX2__)
  __m128i bytes = {};
  std::memcpy(&bytes, from, kLanes<T>);
  return sizeof(T) == 4 ? (VecBits<T>)_mm256_cvtepu8_epi32(bytes)
                        : (VecBits<T>)_mm256_cvtepu8_epi64(bytes);
#else
  VecBits<T> wide;
  for (int i = 0; i < kLanes<T>; ++i) wide[i] = from[i];
  return wide;
#endif
}

// The first `count` lanes of a vector, zeros behind them.
template <class T>
inline Vec<T> first_lanes(Vec<T> v, int64_t count) {
  Vec<T> kept = {};
  std::memcpy(&kept, &v, static_cast<size_t>(count) * sizeof(T));
  return kept;
}

template <class T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};  // unlike value + {}, this keeps a negative zero
}

// The sum of all lanes, in the first lanes: each step adds the upper half of them to the lower one.
template <class T, int half = kLanes<T> / 2, int... lane>
inline Vec<T> fold(Vec<T> v, std::integer_sequence<int, lane...> lanes) {
  v += __builtin_shufflevector(v, v, (lane + half) % kLanes<T>...);
  if constexpr (half == 1) {
    return v;
  } else {
    return fold<T, half / 2>(v, lanes);
  }
}

template <class T>
inline T sum(Vec<T> v) {
  return fold<T>(v, std::make_integer_sequence<int, kLanes<T>>())[0];
}

// Calls f with whole vectors of [0, count) first and then with the rest, as f(offset, lanes).
template <class T, class F>
inline void for_vectors(int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) f(i, kLanes<T>);
  if (i < count) f(i, count - i);
}

template <class T>
inline Vec<T> load_lanes(const T* from, int64_t lanes) {
  return lanes == kLanes<T> ? load(from) : load(from, FirstLanes<T>(lanes));
}

template <class T>
inline void store_lanes(T* to, Vec<T> v, int64_t lanes) {
  if (lanes == kLanes<T>) {
    store(to, v);
  } else if (lanes == kLanes<T> / 2) {  // half a vector, without a call: what row blocks end in
    std::memcpy(to, &v, sizeof v / 2);
  } else {
    store(to, v, FirstLanes<T>(lanes));
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
