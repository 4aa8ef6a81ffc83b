// The kernels of a dense layer that work on blocks of its rows, its samples or its columns.
#pragma once

#include "activation.h"
#include "gemm.h"

namespace bpfree::cpu::BPFREE_ISA {

// Row length of a block's signal: whole vectors.
template <class T>
inline constexpr int64_t kSignalStride = (kRowBlock + kLanes<T> - 1) / kLanes<T> * kLanes<T>;

template <class T>
int64_t forward_scratch(int64_t batch) {
  return kRowBlock * padded<T>(batch);
}

template <class T>
void forward_rows(const Input<T>& x, const T* weight, const T* bias, int64_t out, T* z,
                  int64_t begin, int64_t end, T* scratch) {
  const int64_t stride = padded<T>(x.batch);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block * kRowBlock;
    const int64_t rows = out - row < kRowBlock ? out - row : kRowBlock;
    forward_block(weight + row * x.in, x.in, rows, x, scratch);
    for_columns(scratch, stride, rows, x.batch,
                [&](int64_t n, int64_t r, Vec<T> values, int64_t lanes) {
                  if (bias) values += load_lanes(bias + row + r, lanes);
                  store_lanes(z + n * out + row + r, values, lanes);
                });
  }
}

template <class T>
void forward_samples(const T* x, const Input<T>& weight, const T* bias, T* z, int64_t begin,
                     int64_t end, T* scratch) {
  const int64_t out = weight.batch, stride = padded<T>(out);
  for (int64_t n = begin; n < end; n += kRowBlock) {
    const int64_t samples = end - n < kRowBlock ? end - n : kRowBlock;
    forward_block(x + n * weight.in, weight.in, samples, weight, scratch);
    for (int64_t j = 0; j < samples; ++j) {
      for_vectors<T>(out, [&](int64_t c, int64_t lanes) {
        Vec<T> values = load_lanes(scratch + j * stride + c, lanes);
        if (bias) values += load_lanes(bias + c, lanes);
        store_lanes(z + (n + j) * out + c, values, lanes);
      });
    }
  }
}

template <class T>
void activate_elements(Activation kind, T slope, const T* z, T* y, int64_t begin, int64_t end) {
  with_activation(kind, [&]<Activation activation>() {
    for_vectors<T>(end - begin, [&](int64_t i, int64_t lanes) {
      const Vec<T> value = activate<activation, T>(load_lanes(z + begin + i, lanes), slope).value;
      store_lanes(y + begin + i, value, lanes);
    });
  });
}

template <class T>
void update_bias(const T* signal, int64_t stride, int64_t out, int64_t batch, const Target<T>& to) {
  for_vectors<T>(out, [&](int64_t r, int64_t lanes) {
    Vec<T> total = {};
    for (int64_t n = 0; n < batch; ++n) total += load_lanes(signal + n * stride + r, lanes);
    alignas(64) T g[kLanes<T>];
    store(g, total);
    apply_tile<T>(g, kLanes<T>, 1, lanes, to.at(r), 0);
  });
}

template <class T>
void update_columns(const T* signal, int64_t out, const Input<T>& x, const Targets<T>& to,
                    int64_t begin, int64_t end, T* scratch) {
  const int64_t last = end * kColumns<T> < x.in ? end * kColumns<T> : x.in;
  update_block(signal, out, out, x, begin * kColumns<T>, last, to, scratch);
}

}  // namespace bpfree::cpu::BPFREE_ISA
