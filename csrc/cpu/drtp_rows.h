// DRTP's kernels: a block of rows forward, its signal, its update.
#pragma once

#include "dense_rows.h"

namespace bpfree::cpu::BPFREE_ISA {

template <class T>
int64_t drtp_scratch(int64_t batch) {
  // z and f'(z) by output row, the signal by sample, and what the update's ragged columns need
  return 2 * kRowBlock * padded<T>(batch) + kSignalStride<T> * batch +
         update_block_scratch<T>(batch);
}

// Activation and signal of a block: z [rows][stride] becomes output [batch][out] and signal
// [batch][kSignalStride].
template <class T>
void drtp_signal_block(const DrtpLinear<T>& layer, int64_t row, int64_t rows, T* z, T* derivative,
                       T* signal) {
  const int64_t batch = layer.x.batch, stride = padded<T>(batch);
  with_activation(layer.activation, [&]<Activation kind>() {
    for (int64_t r = 0; r < rows; ++r) {
      const T bias = layer.bias ? layer.bias[row + r] : T(0);
      for (int64_t n = r * stride; n < (r + 1) * stride; n += kLanes<T>) {
        const Activated<T> a = activate<kind, T>(load(z + n) + bias, layer.slope);
        store(z + n, a.value);
        store(derivative + n, a.derivative);
      }
    }
  });
  for_columns(z, stride, rows, batch, [&](int64_t n, int64_t r, Vec<T> values, int64_t lanes) {
    store_lanes(layer.output + n * layer.out + row + r, values, lanes);
  });
  for_columns(derivative, stride, rows, batch,
              [&](int64_t n, int64_t r, Vec<T> values, int64_t lanes) {
                const int32_t label = layer.labels[n];
                const T* feedback = layer.feedback + label * layer.out + row + r;
                const Vec<T> random = label < 0 ? Vec<T>{} : load_lanes(feedback, lanes);
                store(signal + n * kSignalStride<T> + r, random * values);
              });
}

template <class T>
void drtp_rows(const DrtpLinear<T>& layer, int64_t begin, int64_t end, T* scratch) {
  const Input<T>& x = layer.x;
  T* z = scratch;
  T* derivative = z + kRowBlock * padded<T>(x.batch);
  T* signal = derivative + kRowBlock * padded<T>(x.batch);
  T* ragged = signal + kSignalStride<T> * x.batch;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block * kRowBlock;
    const int64_t rows = layer.out - row < kRowBlock ? layer.out - row : kRowBlock;
    forward_block(layer.weight + row * x.in, x.in, rows, x, z);
    drtp_signal_block(layer, row, rows, z, derivative, signal);
    update_block(signal, kSignalStride<T>, rows, x, 0, x.in, {layer.to_weight.at(row * x.in), {}},
                 ragged);
    if (layer.to_bias.value) {
      update_bias<T>(signal, kSignalStride<T>, rows, x.batch, layer.to_bias.at(row));
    }
  }
}

template <class T>
void signal_rows(Activation kind, T slope, const T* z, const T* feedback, const int32_t* labels,
                 int64_t size, T* y, T* signal, int64_t begin, int64_t end) {
  with_activation(kind, [&]<Activation activation>() {
    for (int64_t n = begin; n < end; ++n) {
      const T* row = labels[n] < 0 ? nullptr : feedback + labels[n] * size;
      for_vectors<T>(size, [&](int64_t i, int64_t lanes) {
        const Activated<T> a =
            activate<activation, T>(load_lanes(z + n * size + i, lanes), slope);
        const Vec<T> b = row ? load_lanes(row + i, lanes) : Vec<T>{};
        store_lanes<T>(y + n * size + i, a.value, lanes);
        store_lanes<T>(signal + n * size + i, b * a.derivative, lanes);
      });
    }
  });
}

}  // namespace bpfree::cpu::BPFREE_ISA
