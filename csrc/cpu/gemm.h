// The two products of a learning layer, as tiles that stay in registers.
//
// Forward, z = W x^T: rows of W against packed panels of samples. A panel holds `panel` samples side by
// side, so that a vector is one input feature of many samples and W is read as scalars, unpacked.
// Update, g = signal^T x: rows of the signal against rows of x, where a vector is many input features of
// one sample. Neither operand is packed; the tile goes to the update rule while it is still in cache.
#pragma once

#include "optimizer.h"
#include "transpose.h"

namespace bpfree::cpu::BPFREE_ISA {

// Tile shapes: rows x vectors of accumulators, as many as the registers hold beside the operands.
inline constexpr int kForwardRows = kVectorRegisters == 32 ? 6 : 4;
inline constexpr int kForwardVectors = kVectorRegisters == 32 ? 4 : 3;
inline constexpr int kUpdateRows = kVectorRegisters == 32 ? 8 : 4;
inline constexpr int kUpdateVectors = 3;
// Output rows per work item: a multiple of both tiles' rows; its weights stay in the second-level cache
// between forward and update.
inline constexpr int kRowBlock = 24;
// Samples whose columns of x are used on all rows of a block while they sit in the first-level cache.
inline constexpr int64_t kUpdateSamples = 128;
// The part of a panel that is used on all rows of a block while it sits in the first-level cache.
inline constexpr int64_t kPanelBytes = 24 * 1024;

template <class T>
inline constexpr int64_t kPanel = kForwardVectors * kLanes<T>;
template <class T>
inline constexpr int64_t kColumns = kUpdateVectors * kLanes<T>;

// Width of the panel that starts at `sample`: whole vectors, fewer in the last panel.
template <class T>
inline int64_t panel_width(int64_t sample, int64_t batch) {
  const int64_t left = batch - sample;
  if (left >= kPanel<T>) return kPanel<T>;
  return (left + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Samples rounded up to whole vectors: the row length of z inside a block.
template <class T>
inline int64_t padded(int64_t batch) {
  return (batch + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Calls f.operator()<n>() for a run-time n in [1, max].
template <int max, class F>
inline void with_count(int64_t n, F&& f) {
  if constexpr (max > 1) {
    if (n < max) return with_count<max - 1>(n, f);
  }
  f.template operator()<max>();
}

template <class T>
void pack(const T* x, int64_t batch, int64_t in, T* panels, int64_t begin, int64_t end) {
  for (int64_t sample = 0; sample < batch; sample += kPanel<T>) {
    const int64_t width = panel_width<T>(sample, batch);
    const int64_t here = batch - sample < width ? batch - sample : width;
    T* panel = panels + sample * in + begin * width;
    for_columns(x + sample * in + begin, in, here, end - begin,
                [&](int64_t k, int64_t j, Vec<T> values, int64_t) {
                  store(panel + k * width + j, values);
                });
  }
}

template <class T, int rows, int vectors>
inline void forward_tile(const T* weight, int64_t in, const T* panel, int64_t depth, T* z,
                         int64_t z_stride, bool first) {
  constexpr int64_t width = vectors * kLanes<T>;
  Vec<T> acc[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] = first ? Vec<T>{} : load(z + r * z_stride + v * kLanes<T>);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> x[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) x[v] = load(panel + k * width + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<T> w = splat(weight[r * in + k]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[r][v] += w * x[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(z + r * z_stride + v * kLanes<T>, acc[r][v]);
  }
}

// z[r][sample] of `rows` rows of W, which lie `weight_stride` apart, for the whole batch; z rows
// `padded(batch)` apart.
template <class T>
void forward_block(const T* weight, int64_t weight_stride, int64_t rows, const Input<T>& x, T* z) {
  if (x.batch == 0) return;
  const int64_t stride = padded<T>(x.batch);
  // A small batch has a narrow panel, so that more features of it fit and W is read in longer runs.
  const int64_t panel_depth = kPanelBytes / sizeof(T) / panel_width<T>(0, x.batch);
  for (int64_t sample = 0; sample < x.batch; sample += kPanel<T>) {
    const int64_t width = panel_width<T>(sample, x.batch);
    const T* panel = x.panels + sample * x.in;
    int64_t k = 0;
    do {  // once even without inputs, whose sum is 0
      const int64_t depth = x.in - k < panel_depth ? x.in - k : panel_depth;
      for (int64_t r = 0; r < rows; r += kForwardRows) {
        with_count<kForwardRows>(rows - r, [&]<int tile_rows>() {
          with_count<kForwardVectors>(width / kLanes<T>, [&]<int vectors>() {
            forward_tile<T, tile_rows, vectors>(weight + r * weight_stride + k, weight_stride,
                                                panel + k * width, depth, z + r * stride + sample,
                                                stride, k == 0);
          });
        });
      }
      k += panel_depth;
    } while (k < x.in);
  }
}

// g[r][column] += sum over the batch of signal[n][r] x[n][column], into a tile with rows kColumns apart.
template <class T, int rows, int vectors>
inline void update_tile(const T* signal, int64_t signal_stride, const T* x, int64_t x_stride,
                        int64_t batch, T* g, bool first) {
  Vec<T> acc[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] = first ? Vec<T>{} : load(g + r * kColumns<T> + v * kLanes<T>);
    }
  }
  for (int64_t n = 0; n < batch; ++n) {
    Vec<T> xs[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) xs[v] = load(x + n * x_stride + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<T> s = splat(signal[n * signal_stride + r]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[r][v] += s * xs[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(g + r * kColumns<T> + v * kLanes<T>, acc[r][v]);
  }
}

// Brings the lines of a target tile towards the core while the product that will change it runs.
template <class T>
inline void prefetch_rows(const T* base, int64_t rows, int64_t columns, int64_t stride) {
  if (base == nullptr) return;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; i += kLine) __builtin_prefetch(base + r * stride + i, 1);
  }
}

template <class T>
inline void prefetch_target(const Target<T>& to, int64_t rows, int64_t columns, int64_t stride) {
  prefetch_rows(to.value, rows, columns, stride);
  prefetch_rows(to.m, rows, columns, stride);
  prefetch_rows(to.v, rows, columns, stride);
}

// The gradient of at most kRowBlock rows x kColumns columns, added to `base` (rows as far apart as the
// targets') if that is not null, sent to its targets.
template <class T>
void update_columns_block(const T* signal, int64_t signal_stride, int64_t rows, const T* x,
                          int64_t x_stride, int64_t batch, int64_t columns, const T* base,
                          const Targets<T>& to, int64_t to_stride) {
  alignas(64) T g[kRowBlock * kColumns<T>];
  for (int64_t r = 0; base && r < rows; ++r) {
    for_vectors<T>(columns, [&](int64_t i, int64_t lanes) {
      store(g + r * kColumns<T> + i, load_lanes(base + r * to_stride + i, lanes));
    });
  }
  const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>;
  for (int64_t n = 0; n < batch; n += kUpdateSamples) {
    const int64_t samples = batch - n < kUpdateSamples ? batch - n : kUpdateSamples;
    const bool last = n + samples == batch;
    for (int64_t r = 0; r < rows; r += kUpdateRows) {
      const int64_t here = rows - r < kUpdateRows ? rows - r : kUpdateRows;
      const Targets<T> target = to.at(r * to_stride);
      T* tile = g + r * kColumns<T>;
      if (last) {
        prefetch_target(target.weight, here, columns, to_stride);
        prefetch_target(target.feedback, here, columns, to_stride);
      }
      with_count<kUpdateRows>(here, [&]<int tile_rows>() {
        with_count<kUpdateVectors>(vectors, [&]<int tile_vectors>() {
          update_tile<T, tile_rows, tile_vectors>(signal + n * signal_stride + r, signal_stride,
                                                  x + n * x_stride, x_stride, samples, tile,
                                                  n == 0 && !base);
        });
      });
      if (last) apply_tile(tile, kColumns<T>, here, columns, target, to_stride);
    }
  }
}

// Columns [begin, begin + columns) of x, rows kColumns apart and padded with zeros to whole vectors.
template <class T>
void copy_columns(const Input<T>& x, int64_t begin, int64_t columns, T* to) {
  for (int64_t n = 0; n < x.batch; ++n) {
    for_vectors<T>(columns, [&](int64_t i, int64_t lanes) {
      store(to + n * kColumns<T> + i, load_lanes(x.rows + n * x.in + begin + i, lanes));
    });
  }
}

// Elements that update_block needs as scratch.
template <class T>
int64_t update_block_scratch(int64_t batch) {
  return batch * kColumns<T>;
}

// Gradient rows [0, rows) x columns [begin, end) of signal^T x, tile by tile, sent to `to`, the targets of
// element (0, 0) with rows x.in apart. The signal's rows are `signal_stride` apart.
template <class T>
void update_block(const T* signal, int64_t signal_stride, int64_t rows, const Input<T>& x,
                  int64_t begin, int64_t end, const Targets<T>& to, T* scratch) {
  for (int64_t k = begin; k < end; k += kColumns<T>) {
    const int64_t columns = end - k < kColumns<T> ? end - k : kColumns<T>;
    const T* source = x.rows + k;
    int64_t source_stride = x.in;
    if (columns % kLanes<T> != 0) {  // the ragged last columns: a zero-padded copy of x
      copy_columns(x, k, columns, scratch);
      source = scratch;
      source_stride = kColumns<T>;
    }
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      const int64_t here = rows - row < kRowBlock ? rows - row : kRowBlock;
      update_columns_block<T>(signal + row, signal_stride, here, source, source_stride, x.batch,
                              columns, nullptr, to.at(row * x.in + k), x.in);
    }
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
