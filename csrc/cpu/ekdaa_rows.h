// EKDAA's error of the units below: up-sampling, target and difference (equations:
// bpfree_kernels/ops/ekdaa.py).
#pragma once

#include "activation.h"
#include "conv_rows.h"

namespace bpfree::cpu::BPFREE_ISA {

inline bool is_pooled(const Pooling& pool) {
  return pool.kernel_h * pool.kernel_w * pool.stride_h * pool.stride_w != 1 || pool.pad_top || pool.pad_left;
}

inline int64_t reach(int64_t kernel, int64_t dilation) { return (kernel - 1) * dilation + 1; }

// Whether no unit lies in two windows.
inline bool is_disjoint(const Pooling& pool) {
  return (pool.stride_h >= reach(pool.kernel_h, pool.dilation_h)) &&
         (pool.stride_w >= reach(pool.kernel_w, pool.dilation_w));
}

struct Rows {
  int64_t begin, end;
};

// The pooled rows whose windows may hold units of rows [begin, end).
inline Rows pooled_rows(const Pooling& pool, int64_t begin, int64_t end) {
  const int64_t high = reach(pool.kernel_h, pool.dilation_h);
  const int64_t first = -floor_div(-(begin + pool.pad_top - high + 1), pool.stride_h);
  const int64_t last = floor_div(end - 1 + pool.pad_top, pool.stride_h) + 1;
  const Rows rows = {first < 0 ? 0 : first, last < pool.rows ? last : pool.rows};
  return rows.begin < rows.end ? rows : Rows{0, 0};
}

// The rows of units that the windows of some pooled rows hold, beside rows [begin, end).
inline Rows window_rows(const Pooling& pool, const Rows& pooled, int64_t begin, int64_t end) {
  if (pooled.begin == pooled.end) return {begin, end};
  const int64_t first = pooled.begin * pool.stride_h - pool.pad_top;
  const int64_t last = (pooled.end - 1) * pool.stride_h - pool.pad_top +
                       reach(pool.kernel_h, pool.dilation_h);
  const Rows rows = {first < begin ? first : begin, last > end ? last : end};
  return {rows.begin < 0 ? 0 : rows.begin, rows.end < pool.height ? rows.end : pool.height};
}

// Calls f(element, row, column) for the units of the window of a pooled position, in order.
template <class F>
inline void for_window(const Pooling& pool, int64_t row, int64_t column, F&& f) {
  for (int64_t i = 0; i < pool.kernel_h; ++i) {
    const int64_t h = row * pool.stride_h - pool.pad_top + i * pool.dilation_h;
    if (h < 0 || h >= pool.height) continue;
    for (int64_t j = 0; j < pool.kernel_w; ++j) {
      const int64_t w = column * pool.stride_w - pool.pad_left + j * pool.dilation_w;
      if (w < 0 || w >= pool.width) continue;
      f(static_cast<int32_t>(i * pool.kernel_w + j), h, w);
    }
  }
}

// The largest z under a window, and which element it is: of equal ones, or of NaNs, the first.
template <class T>
struct Winner {
  Vec<T> z;
  VecBits<T> element;
};

template <class T>
inline Winner<T> find_winner(const Pooling& pool, const T* z, int64_t z_begin, int64_t row,
                             int64_t column, int64_t lanes) {
  Winner<T> winner = {splat<T>(T(-__builtin_inf())), VecBits<T>{} - 1};
  for_window(pool, row, column, [&](int32_t element, int64_t h, int64_t w) {
    const Vec<T> here = load_lanes(z + ((h - z_begin) * pool.width + w) * pool.inner, lanes);
    const VecBits<T> wins = (here > winner.z) | ((here != here) & (winner.z == winner.z)) |
                            (winner.element < 0);
    winner.z = wins ? here : winner.z;
    winner.element = wins ? VecBits<T>{} + element : winner.element;
  });
  return winner;
}

// f(z) - f(z - beta d).
template <Activation kind, class T>
inline Vec<T> error_of(const ErrorMaps<T>& maps, Vec<T> z, Vec<T> d) {
  return -difference<kind, T>(z, -maps.beta * d, maps.slope);
}

// The errors of rows [begin, end) where no unit lies in two windows and the winner takes all: one difference
// a window.
template <Activation kind, class T>
void align_winners(const ErrorMaps<T>& maps, const T* z, int64_t z_begin, const T* d,
                   const Rows& pooled, int64_t begin, int64_t end, T* error) {
  const Pooling& pool = maps.pool;
  fill_zero(error, (end - begin) * pool.width * pool.inner);
  for (int64_t row = pooled.begin; row < pooled.end; ++row) {
    for (int64_t column = 0; column < pool.columns; ++column, d += pool.inner) {
      for_vectors<T>(pool.inner, [&](int64_t c, int64_t lanes) {
        const Winner<T> winner = find_winner<T>(pool, z + c, z_begin, row, column, lanes);
        const Vec<T> e = error_of<kind>(maps, winner.z, load_lanes(d + c, lanes));
        for_window(pool, row, column, [&](int32_t element, int64_t h, int64_t w) {
          if (h < begin || h >= end) return;
          T* to = error + ((h - begin) * pool.width + w) * pool.inner + c;
          store_lanes<T>(to, winner.element == VecBits<T>{} + element ? e : Vec<T>{}, lanes);
        });
      });
    }
  }
}

// What the pooled d is at units of rows [begin, end), summed over the windows that hold them.
template <class T>
void spread(const ErrorMaps<T>& maps, const T* z, int64_t z_begin, const T* d, const Rows& pooled,
            int64_t begin, int64_t end, T* shift) {
  const Pooling& pool = maps.pool;
  const T share = maps.upsample == Upsampling::average ? T(1) / (pool.kernel_h * pool.kernel_w) : T(1);
  const bool to_winner = maps.upsample == Upsampling::argmax;
  fill_zero(shift, (end - begin) * pool.width * pool.inner);
  for (int64_t row = pooled.begin; row < pooled.end; ++row) {
    for (int64_t column = 0; column < pool.columns; ++column, d += pool.inner) {
      for_vectors<T>(pool.inner, [&](int64_t c, int64_t lanes) {
        const Vec<T> value = share * load_lanes(d + c, lanes);
        const VecBits<T> winner =
            to_winner ? find_winner<T>(pool, z + c, z_begin, row, column, lanes).element
                      : VecBits<T>{};
        for_window(pool, row, column, [&](int32_t element, int64_t h, int64_t w) {
          if (h < begin || h >= end) return;
          T* to = shift + ((h - begin) * pool.width + w) * pool.inner + c;
          const Vec<T> before = load_lanes(to, lanes), after = before + value;
          const bool all = !to_winner;
          store_lanes<T>(to, all ? after : winner == VecBits<T>{} + element ? after : before, lanes);
        });
      });
    }
  }
}

// Elements of scratch that align_rows needs for so many rows, the rows of their windows beside them.
template <class T>
int64_t align_scratch(const Pooling& pool, int64_t rows) {
  const int64_t more = 2 * reach(pool.kernel_h, pool.dilation_h);
  return 3 * (rows + more) * pool.width * pool.inner;
}

// The errors of rows [begin, end) of one sample, from d of the pooled rows whose windows hold them.
template <class T>
void align_rows(const ErrorMaps<T>& maps, int64_t sample, const T* d, const Rows& pooled, int64_t begin,
                int64_t end, T* scratch) {
  const Pooling& pool = maps.pool;
  const int64_t size = pool.height * pool.width, row = pool.width * pool.inner;
  const Rows held = window_rows(pool, pooled, begin, end);
  const T* z = read_run<T>(maps.z, sample, pool.inner, size, held.begin * pool.width,
                           held.end * pool.width, scratch);
  T* shift = scratch + (held.end - held.begin) * row;
  const Maps<T> to = sample_of(maps.error, sample, pool.inner, size);
  T* error = to.channels_last ? to.data + begin * row : shift + (end - begin) * row;
  const bool pools = is_pooled(pool);
  const bool winners = pools && maps.upsample == Upsampling::argmax && is_disjoint(pool);
  if (pools && !winners) {
    spread(maps, z, held.begin, d, pooled, begin, end, shift);
    d = shift;
  }
  with_activation(maps.activation, [&]<Activation kind>() {
    if (winners) {
      return align_winners<kind>(maps, z, held.begin, d, pooled, begin, end, error);
    }
    const T* here = z + (begin - held.begin) * row;
    for_vectors<T>((end - begin) * row, [&](int64_t i, int64_t lanes) {
      store_lanes(error + i, error_of<kind>(maps, load_lanes(here + i, lanes), load_lanes(d + i, lanes)),
                  lanes);
    });
  });
  if (to.channels_last) return;
  for_maps<T>(error, 1, pool.inner, size, false, begin * pool.width, end * pool.width,
              [&](int64_t offset, Vec<T> values, int64_t lanes) {
                store_lanes(to.data + offset, values, lanes);
              });
}

// Pooled rows whose windows may hold units of so many rows.
inline int64_t most_pooled_rows(const Pooling& pool, int64_t rows) {
  const int64_t most = (rows + reach(pool.kernel_h, pool.dilation_h)) / pool.stride_h + 1;
  return most < pool.rows ? most : pool.rows;
}

template <class T>
int64_t error_rows_scratch(const Pooling& pool, int64_t rows) {
  return align_scratch<T>(pool, rows) + most_pooled_rows(pool, rows) * pool.columns * pool.inner;
}

// e of rows [begin, end) of one sample, from d as maps.
template <class T>
void error_rows(const ErrorMaps<T>& maps, const Maps<const T>& d, int64_t sample, int64_t begin,
                int64_t end, T* scratch) {
  const Pooling& pool = maps.pool;
  const Rows pooled = pooled_rows(pool, begin, end);
  T* room = scratch + align_scratch<T>(pool, end - begin);
  const T* from = read_run<T>(d, sample, pool.inner, pool.rows * pool.columns,
                              pooled.begin * pool.columns, pooled.end * pool.columns, room);
  align_rows(maps, sample, from, pooled, begin, end, scratch);
}

template <class T>
int64_t conv_error_rows_scratch(const Windows& windows, const Pooling& pool, int64_t rows) {
  return padded<T>(error_rows_scratch<T>(pool, rows)) +
         deconvolve_scratch<T>(windows, most_pooled_rows(pool, rows));
}

// The same with d as the transposed convolution of an error.
template <class T>
void conv_error_rows(const ErrorKernel<T>& layer, int64_t sample, int64_t begin, int64_t end,
                     T* scratch) {
  const Pooling& pool = layer.below.pool;
  const Rows pooled = pooled_rows(pool, begin, end);
  T* d = scratch + align_scratch<T>(pool, end - begin);
  T* room = scratch + padded<T>(error_rows_scratch<T>(pool, end - begin));
  deconvolve(layer.windows, layer.error, sample, layer.packed, pooled.begin, pooled.end, d, room);
  align_rows(layer.below, sample, d, pooled, begin, end, scratch);
}

}  // namespace bpfree::cpu::BPFREE_ISA
