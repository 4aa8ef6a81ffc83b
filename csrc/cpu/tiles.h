// Tiles of products whose one operand is read as single values where they lie, the other as vectors of output
// channels: what locally connected layers and convolutions share.
#pragma once

#include "dense_rows.h"

namespace bpfree::cpu::BPFREE_ISA {

// Accumulators of a tile, as many as the registers hold beside the operands, and how wide it is at most.
inline constexpr int kTile = kVectorRegisters == 32 ? 24 : 12;
inline constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;
constexpr int tile_rows(int vectors) {
  return kTile / vectors < 12 ? kTile / vectors : 12;
}

// Output channels of a group that one tile takes: [column, column + width), in `vectors` vectors.
template <class T>
struct ColumnTile {
  int64_t column, width, vectors;
  FirstLanes<T> last;  // of the last vector

  ColumnTile(int64_t column, int64_t left)
      : column(column),
        width(left < kTileVectors * kLanes<T> ? left : kTileVectors * kLanes<T>),
        vectors((width + kLanes<T> - 1) / kLanes<T>),
        last(width - (vectors - 1) * kLanes<T>) {}
};

// Calls f.operator()<rows, vectors>(row) for tiles that share `count` rows evenly.
template <class F>
inline void for_row_tiles(int64_t count, int64_t vectors, F&& f) {
  with_count<kTileVectors>(vectors, [&]<int wide>() {
    constexpr int most = tile_rows(wide);
    const int64_t tiles = (count + most - 1) / most;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = t * count / tiles, next = (t + 1) * count / tiles;
      with_count<most>(next - row, [&]<int rows>() { f.template operator()<rows, wide>(row); });
    }
  });
}

// Elements of scratch that hold `count` indices.
template <class T>
int64_t index_elements(int64_t count) {
  const int64_t elements = count * sizeof(int64_t) / sizeof(T);
  return (elements + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// What a gradient sums over: `runs` times `count` places (or samples), and the steps between them.
struct Runs {
  int64_t runs, count;
  int64_t x_run, x_step;
  int64_t signal_run, signal_step;
};

// Gradient of `rows` weight rows x `vectors` of their columns, values under the window times signals, written
// to g or added to it.
template <class T, int rows, int vectors>
inline void learning_tile(const T* x, const int64_t* offsets, const T* signal, const Runs& over,
                          bool adds, T* g, int64_t g_stride) {
  Vec<T> acc[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      acc[r][v] = adds ? load(g + r * g_stride + v * kLanes<T>) : Vec<T>{};
    }
  }
  for (int64_t run = 0; run < over.runs; ++run) {
    const T* at[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) at[r] = x + run * over.x_run + offsets[r];
    const T* from = signal + run * over.signal_run;
    for (int64_t n = 0; n < over.count; ++n) {
      Vec<T> s[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) s[v] = load(from + n * over.signal_step + v * kLanes<T>);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Vec<T> value = splat(at[r][n * over.x_step]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) acc[r][v] += value * s[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(g + r * g_stride + v * kLanes<T>, acc[r][v]);
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
