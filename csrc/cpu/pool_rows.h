// Max pooling of maps and of their changes (equations: bpfree_kernels/ops/pepita_pool.py).
#pragma once

#include "math.h"

namespace bpfree::cpu::BPFREE_ISA {

// `of` where it is larger than `most`, or NaN, which a maximum keeps.
template <class T>
inline VecBits<T> takes(Vec<T> of, Vec<T> most) {
  return (of > most) | (of != of);
}

// One vector of pooled values: the maximum of a window, or with `change` how that changes.
template <class T, bool changes>
inline Vec<T> pool_window(const T* y, const T* change, const Pooling& pool, int64_t row,
                          int64_t column, int64_t lanes) {
  Vec<T> most = splat<T>(T(-__builtin_inf()));
  Vec<T> most_after = most, value = most, step = {};
  for (int64_t i = 0; i < pool.kernel_h; ++i) {
    const int64_t h = row * pool.stride_h - pool.pad_top + i * pool.dilation_h;
    if (h < 0 || h >= pool.height) continue;
    for (int64_t j = 0; j < pool.kernel_w; ++j) {
      const int64_t w = column * pool.stride_w - pool.pad_left + j * pool.dilation_w;
      if (w < 0 || w >= pool.width) continue;
      const int64_t at = (h * pool.width + w) * pool.inner;
      const Vec<T> here = load_lanes(y + at, lanes);
      most = takes<T>(here, most) ? here : most;
      if constexpr (changes) {
        const Vec<T> by = load_lanes(change + at, lanes), after = here + by;
        const VecBits<T> now = takes<T>(after, most_after);
        most_after = now ? after : most_after;
        value = now ? here : value;
        step = now ? by : step;
      }
    }
  }
  return changes ? step + (value - most) : most;
}

template <class T>
void max_pool(const Pooling& pool, const T* y, const T* change, T* pooled, int64_t begin,
              int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t map = row / pool.rows * pool.height * pool.width * pool.inner;
    for (int64_t column = 0; column < pool.columns; ++column) {
      T* to = pooled + (row * pool.columns + column) * pool.inner;
      for_vectors<T>(pool.inner, [&](int64_t c, int64_t lanes) {
        const T* from = y + map + c;
        const Vec<T> result =
            change ? pool_window<T, true>(from, change + map + c, pool, row % pool.rows, column, lanes)
                   : pool_window<T, false>(from, nullptr, pool, row % pool.rows, column, lanes);
        store_lanes(to + c, result, lanes);
      });
    }
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
