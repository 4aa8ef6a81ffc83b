// What an inverse carries down to the maps below a convolution: their values, or an error
// (equations: bpfree_kernels/ops/invertible_conv.py).
#pragma once

#include "activation.h"
#include "conv_rows.h"

namespace bpfree::cpu::BPFREE_ISA {

// Scratch of a block of rows: a row of the maps below, the taps, and two bands of outputs.
template <class T>
struct InverseRoom {
  T* below;
  Tap* taps;
  T* signals;
  T* targets;

  InverseRoom(const Windows& windows, int64_t rows, T* scratch)
      : below(scratch),
        taps(reinterpret_cast<Tap*>(scratch + 2 * maps_size(windows, rows))),
        signals(scratch + 2 * maps_size(windows, rows) + index_elements<T>(2 * kernel_elements(windows))),
        targets(signals + padded<T>(signal_band_elements(windows, rows))) {}

  static int64_t maps_size(const Windows& windows, int64_t rows) {
    return padded<T>(rows * windows.width * windows.in);
  }
};

template <class T>
int64_t inverse_scratch(const Windows& windows, int64_t rows) {
  return 2 * InverseRoom<T>::maps_size(windows, rows) + index_elements<T>(2 * kernel_elements(windows)) +
         2 * padded<T>(signal_band_elements(windows, rows));
}

// How many windows hold each place of [0, size) along one dimension.
inline int64_t windows_at(int64_t place, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                          int64_t positions) {
  int64_t count = 0;
  for (int64_t i = 0; i < kernel; ++i) {
    const int64_t from = place + pad - i * dilation;
    count += from >= 0 && from % stride == 0 && from / stride < positions;
  }
  return count;
}

// z - b of a band of outputs in place; of targets beside them the nudge. Outside the map there stays 0.
template <Activation kind, class T>
void undo_outputs(const Windows& windows, const Reconstruction<T>& from, T slope, T rate, const Band& band,
                  T* outputs, const T* targets) {
  constexpr bool leaky = kind == Activation::leaky_relu;
  const T inverse_slope = T(1) / slope;  // a division for every value would cost more than the product
  const Vec<T> zero = {}, one = splat<T>(T(1));
  for (int64_t r = 0; r < band.rows; ++r) {
    if (band.top + r < 0 || band.top + r >= windows.rows) continue;
    for (int64_t column = 0; column < band.columns; ++column) {
      if (band.left + column < 0 || band.left + column >= windows.columns) continue;
      const int64_t at = (r * band.columns + column) * windows.out;
      for_vectors<T>(windows.out, [&](int64_t c, int64_t lanes) {
        Vec<T> a = load_lanes(outputs + at + c, lanes);
        if (targets) {  // f' by the sign of f, which is that of z
          const Vec<T> gain = leaky ? (a > zero ? one : splat<T>(slope)) : one;
          a += rate * gain * gain * (load_lanes(targets + at + c, lanes) - a);
        }
        if (leaky) a = a > zero ? a : a * inverse_slope;
        if (from.bias) a -= load_lanes(from.bias + c, lanes);
        store_lanes(outputs + at + c, a, lanes);
      });
    }
  }
}

// Rows [begin, end) of one sample's maps below, [row][column][channel], written to their order in memory.
template <class T>
void write_rows(const InverseConv<T>& layer, int64_t sample, int64_t begin, int64_t end, const T* rows) {
  const Windows& windows = layer.windows;
  const int64_t size = windows.height * windows.width;
  const Maps<T> to = sample_of(layer.to, sample, windows.in, size);
  for_maps<T>(rows, 1, windows.in, size, to.channels_last, begin * windows.width, end * windows.width,
              [&](int64_t offset, Vec<T> values, int64_t lanes) {
                store_lanes(to.data + offset, values, lanes);
              });
}

template <class T>
void reconstruct_rows(const InverseConv<T>& layer, const Reconstruction<T>& from, int64_t sample, int64_t begin,
                      int64_t end, T* scratch) {
  const Windows& w = layer.windows;
  const InverseRoom<T> room(w, end - begin, scratch);
  const Band band = band_of_signal(w, begin, end);
  copy_band(from.output, sample, w.out, w.rows, w.columns, band, room.signals);
  const T* targets = from.target.data ? room.targets : nullptr;
  if (targets) copy_band(from.target, sample, w.out, w.rows, w.columns, band, room.targets);
  const T rate = targets ? from.rate[sample] : T(0);
  const auto undo = layer.activation == Activation::leaky_relu ? undo_outputs<Activation::leaky_relu, T>
                                                               : undo_outputs<Activation::identity, T>;
  undo(w, from, layer.slope, rate, band, room.signals, targets);
  deconvolve_band(w, room.signals, band, layer.packed, begin, end, room.below, room.taps);
  const T* x = read_run<T>(from.x, sample, w.in, w.height * w.width, begin * w.width, end * w.width,
                           room.below + InverseRoom<T>::maps_size(w, end - begin));
  T* rows = room.below;
  for (int64_t h = begin; h < end; ++h) {
    const int64_t down = windows_at(h, w.kernel_h, w.stride_h, w.pad_top, w.dilation_h, w.rows);
    for (int64_t column = 0; column < w.width; ++column, rows += w.in, x += w.in) {
      const int64_t across =
          windows_at(column, w.kernel_w, w.stride_w, w.pad_left, w.dilation_w, w.columns);
      const T more = static_cast<T>(down * across - 1);
      for_vectors<T>(w.in, [&](int64_t c, int64_t lanes) {
        store_lanes<T>(rows + c, load_lanes(rows + c, lanes) - more * load_lanes(x + c, lanes), lanes);
      });
    }
  }
  write_rows(layer, sample, begin, end, room.below);
}

template <class T>
void inverse_error_rows(const InverseConv<T>& layer, const Maps<const T>& signal, const Maps<const T>& gate,
                        int64_t sample, int64_t begin, int64_t end, T* scratch) {
  const Windows& w = layer.windows;
  const InverseRoom<T> room(w, end - begin, scratch);
  const Band band = band_of_signal(w, begin, end);
  copy_band(signal, sample, w.out, w.rows, w.columns, band, room.signals);
  deconvolve_band(w, room.signals, band, layer.packed, begin, end, room.below, room.taps);
  if (gate.data) {
    const T* z = read_run<T>(gate, sample, w.in, w.height * w.width, begin * w.width, end * w.width,
                             room.below + InverseRoom<T>::maps_size(w, end - begin));
    with_activation(layer.activation, [&]<Activation kind>() {
      for_vectors<T>((end - begin) * w.width * w.in, [&](int64_t i, int64_t lanes) {
        const Vec<T> slope = activate<kind, T>(load_lanes(z + i, lanes), layer.slope).derivative;
        store_lanes<T>(room.below + i, slope * load_lanes(room.below + i, lanes), lanes);
      });
    });
  }
  write_rows(layer, sample, begin, end, room.below);
}

}  // namespace bpfree::cpu::BPFREE_ISA
