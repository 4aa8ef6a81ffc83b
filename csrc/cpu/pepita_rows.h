// PEPITA's kernels: the change that a second pass makes, and what is learned from it.
#pragma once

#include "dense_rows.h"

namespace bpfree::cpu::BPFREE_ISA {

template <class T>
int64_t pepita_scratch(int64_t batch, int64_t classes) {
  // the change of z and W F by output row, the signal by sample, and the update's ragged columns
  return kRowBlock * (padded<T>(batch) + padded<T>(classes)) + kSignalStride<T> * batch +
         update_block_scratch<T>(batch);
}

// The change of z of a block of rows, [rows][padded(batch)].
template <class T>
void change_of_rows(const PepitaLinear<T>& layer, int64_t row, int64_t rows, T* change,
                    T* projected) {
  const int64_t in = layer.change.in, classes = layer.error.in;
  const T* weight = layer.weight + row * in;
  if (!layer.error.panels) return forward_block(weight, in, rows, layer.change, change);
  forward_block(weight, in, rows, layer.change, projected);
  forward_block(projected, padded<T>(classes), rows, layer.error, change);
}

template <class T>
void pepita_rows(const PepitaLinear<T>& layer, int64_t begin, int64_t end, T* scratch) {
  const int64_t batch = layer.pre.batch, in = layer.pre.in, stride = padded<T>(batch);
  T* change = scratch;
  T* signal = change + kRowBlock * stride;
  T* ragged = signal + kSignalStride<T> * batch;
  T* projected = ragged + update_block_scratch<T>(batch);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block * kRowBlock;
    const int64_t rows = layer.out - row < kRowBlock ? layer.out - row : kRowBlock;
    change_of_rows(layer, row, rows, change, projected);
    with_activation(layer.activation, [&]<Activation kind>() {
      for_columns(change, stride, rows, batch,
                  [&](int64_t n, int64_t r, Vec<T> values, int64_t lanes) {
                    const int64_t at = n * layer.out + row + r;
                    const Vec<T> z = load_lanes(layer.z + at, lanes);
                    Vec<T> changed = difference<kind, T>(z, values, layer.slope);
                    if (layer.mask) changed *= load_lanes(layer.mask + at, lanes);
                    store_lanes(layer.difference + at, changed, lanes);
                    store<T>(signal + n * kSignalStride<T> + r, layer.scale * changed);
                  });
    });
    update_block(signal, kSignalStride<T>, rows, layer.pre, 0, in, {layer.to_weight.at(row * in), {}},
                 ragged);
    if (layer.to_bias.value) {
      update_bias<T>(signal, kSignalStride<T>, rows, batch, layer.to_bias.at(row));
    }
  }
}

template <class T>
void difference_elements(Activation kind, T slope, const T* z, const T* change, T* y, int64_t begin,
                         int64_t end) {
  with_activation(kind, [&]<Activation activation>() {
    for_vectors<T>(end - begin, [&](int64_t i, int64_t lanes) {
      const Vec<T> at = load_lanes(z + begin + i, lanes);
      const Vec<T> step = load_lanes(change + begin + i, lanes);
      store_lanes(y + begin + i, difference<activation, T>(at, step, slope), lanes);
    });
  });
}

template <class T>
int64_t mixed_scratch(int64_t classes) {
  return classes * kColumns<T>;
}

// The mixtures of kUpdateRows samples at a time are a tile of the update product, coefficients^T basis.
template <class T, class F>
void mix_columns(const Mixture<T>& mixture, int64_t column, int64_t columns, T* padded_basis,
                 F&& f) {
  alignas(64) T tile[kUpdateRows * kColumns<T>];
  const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>;
  const T* basis = mixture.basis + column;
  int64_t stride = mixture.size;
  if (columns % kLanes<T> != 0) {  // the ragged last columns: a copy with zeros behind
    for (int64_t c = 0; c < mixture.classes; ++c) {
      for_vectors<T>(columns, [&](int64_t i, int64_t lanes) {
        store<T>(padded_basis + c * kColumns<T> + i, load_lanes(basis + c * stride + i, lanes));
      });
    }
    basis = padded_basis;
    stride = kColumns<T>;
  }
  for (int64_t n = 0; n < mixture.batch; n += kUpdateRows) {
    const int64_t rows = mixture.batch - n < kUpdateRows ? mixture.batch - n : kUpdateRows;
    with_count<kUpdateRows>(rows, [&]<int tile_rows>() {
      with_count<kUpdateVectors>(vectors, [&]<int tile_vectors>() {
        update_tile<T, tile_rows, tile_vectors>(mixture.coefficients + n, mixture.batch, basis,
                                                stride, mixture.classes, tile, true);
      });
    });
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (n + r) * mixture.size + column;
      for_vectors<T>(columns, [&](int64_t i, int64_t lanes) {
        f(at + i, load(tile + r * kColumns<T> + i), lanes);
      });
    }
  }
}

template <class T>
void mixed_difference(Activation kind, T slope, const T* z, const Mixture<T>& mixture, T* y,
                      int64_t begin, int64_t end, T* scratch) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t column = block * kColumns<T>;
    const int64_t left = mixture.size - column;
    const int64_t columns = left < kColumns<T> ? left : kColumns<T>;
    if (!z) {
      mix_columns(mixture, column, columns, scratch, [&](int64_t at, Vec<T> mixed, int64_t lanes) {
        store_lanes<T>(y + at, mixture.gain * mixed, lanes);
      });
      continue;
    }
    with_activation(kind, [&]<Activation activation>() {
      mix_columns(mixture, column, columns, scratch, [&](int64_t at, Vec<T> mixed, int64_t lanes) {
        const Vec<T> before = load_lanes(z + at, lanes);
        store_lanes<T>(y + at, mixture.gain * difference<activation, T>(before, mixed, slope), lanes);
      });
    });
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
