// Transposition in registers: what one side of a kernel has by row, the other wants by column.
#pragma once

#include <utility>

#include "vec.h"

namespace bpfree::cpu::BPFREE_ISA {

// One step of the butterfly: exchanges the off-diagonal blocks of `step` x `step` lanes of two rows.
template <class T, int step, int... lane>
inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, lane...>) {
  constexpr int n = kLanes<T>;
  const Vec<T> first = a;
  a = __builtin_shufflevector(first, b, ((lane & step) ? n + lane - step : lane)...);
  b = __builtin_shufflevector(first, b, ((lane & step) ? n + lane : lane + step)...);
}

template <class T, int step = 1>
inline void transpose_square(Vec<T> (&v)[kLanes<T>]) {
  if constexpr (step < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i & step) == 0) {
        exchange<T, step>(v[i], v[i + step], std::make_integer_sequence<int, kLanes<T>>());
      }
    }
    transpose_square<T, 2 * step>(v);
  }
}

// Calls f(column, row, values, lanes) for every column of from [rows][columns], rows `stride` apart, with
// the values of `lanes` rows from `row` on; zeros behind them.
template <class T, class F>
inline void for_columns(const T* from, int64_t stride, int64_t rows, int64_t columns, F&& f) {
  for_vectors<T>(rows, [&](int64_t row, int64_t lanes) {
    for_vectors<T>(columns, [&](int64_t column, int64_t width) {
      Vec<T> v[kLanes<T>];
      const T* corner = from + row * stride + column;
      if (lanes == kLanes<T> && width == kLanes<T>) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<T>; ++i) v[i] = load(corner + i * stride);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<T>; ++i) {
          v[i] = i < lanes ? load_lanes(corner + i * stride, width) : Vec<T>{};
        }
      }
      transpose_square<T>(v);
      if (width == kLanes<T>) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<T>; ++i) f(column + i, row, v[i], lanes);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<T>; ++i) {
          if (i < width) f(column + i, row, v[i], lanes);
        }
      }
    });
  });
}

}  // namespace bpfree::cpu::BPFREE_ISA
