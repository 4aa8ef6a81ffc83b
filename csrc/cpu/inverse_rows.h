// The products that keep track of a weight's inverse (equations: bpfree_kernels/ops/inverse.py).
#pragma once

#include "dense_rows.h"

namespace bpfree::cpu::BPFREE_ISA {

// Rows per work item: more than a forward's, so that a packed panel serves more of them in the first-level
// cache; their products stay in the second-level one.
inline constexpr int kGramRows = 4 * kRowBlock;

template <class T>
int64_t orthogonality_scratch(int64_t out) {
  return kGramRows * padded<T>(out);
}

// Row blocks [begin, end) of W W^T - I, from the diagonal on, written on both sides of it. A block begins at
// a whole panel, and writes what lies before the diagonal not at all: another block mirrors it there.
template <class T>
void orthogonality_rows(const Input<T>& weight, T* g, int64_t begin, int64_t end, T* scratch) {
  const int64_t out = weight.batch;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block * kGramRows, rows = out - row < kGramRows ? out - row : kGramRows;
    const int64_t first = row / kPanel<T> * kPanel<T>;
    const Input<T> rest = {nullptr, weight.panels + first * weight.in, out - first, weight.in};
    forward_block(weight.rows + row * weight.in, weight.in, rows, rest, scratch);
    const int64_t stride = padded<T>(rest.batch), skip = row - first;
    for (int64_t r = 0; r < rows; ++r) {
      T* values = scratch + r * stride + skip;
      values[r] -= T(1);
      for_vectors<T>(out - row, [&](int64_t n, int64_t lanes) {
        store_lanes(g + (row + r) * out + row + n, load_lanes(values + n, lanes), lanes);
      });
    }
    const T* below = scratch + skip + rows;
    for_columns(below, stride, rows, out - row - rows,
                [&](int64_t n, int64_t r, Vec<T> values, int64_t lanes) {
                  store_lanes(g + (row + rows + n) * out + row + r, values, lanes);
                });
  }
}

// A signal [batch, out] as [row block][batch][kRowBlock], times `scale`: the product reads it in one run, where
// its own rows could lie a power of two apart.
template <class T>
void pack_signal(const T* signal, int64_t batch, int64_t out, T scale, bool off_diagonal, T* packed,
                 int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = block * kRowBlock, rows = out - row < kRowBlock ? out - row : kRowBlock;
    T* to = packed + row * batch;
    for (int64_t n = 0; n < batch; ++n, to += kRowBlock) {
      for_vectors<T>(rows, [&](int64_t r, int64_t lanes) {
        store_lanes<T>(to + r, scale * load_lanes(signal + n * out + row + r, lanes), lanes);
      });
      if (off_diagonal && n >= row && n < row + rows) to[n - row] = T(0);
    }
  }
}

template <class T>
int64_t packed_signal(int64_t batch, int64_t out) {
  return (out + kRowBlock - 1) / kRowBlock * kRowBlock * batch;
}

// base + signal^T x. Of x only a copy of each block of columns is read: the target may be x.
template <class T>
void add_product(const T* packed, int64_t out, const Input<T>& x, const T* base, const Target<T>& to,
                 int64_t begin, int64_t end, T* scratch) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t k = block * kColumns<T>, left = x.in - k;
    const int64_t columns = left < kColumns<T> ? left : kColumns<T>;
    copy_columns(x, k, columns, scratch);
    for (int64_t row = 0; row < out; row += kRowBlock) {
      const int64_t rows = out - row < kRowBlock ? out - row : kRowBlock, at = row * x.in + k;
      update_columns_block<T>(packed + row * x.batch, kRowBlock, rows, scratch, kColumns<T>, x.batch,
                              columns, base + at, {to.at(at), {}}, x.in);
    }
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
