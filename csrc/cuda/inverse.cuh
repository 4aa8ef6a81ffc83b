// Kernels around the products of an inverse: identities, the terms of a series, and how far off they are.
//
// Norms are summed in two steps, over each block and over all blocks, in an order that depends on nothing but
// the number of elements.
#pragma once

#include "device.cuh"
#include "divide.cuh"

namespace bpfree::cuda {

// G <- G - I of a matrix [size, size], with what lies above the diagonal mirrored below: the last digits of a
// product W W^T need not be symmetric.
template <class T>
__global__ void __launch_bounds__(kThreads) subtract_identity_kernel(Divisor size, T* matrix) {
  for_each(size.value() * size.value(), [&](int64_t i) {
    const int64_t row = size.quotient(i), column = size.remainder(i);
    if (row == column) {
      matrix[i] -= T(1);
    } else if (row > column) {
      matrix[i] = matrix[column * size.value() + row];
    }
  });
}

// A copy of a matrix [size, size] with zeros on the diagonal, whose elements lie size + 1 apart.
template <class T>
__global__ void __launch_bounds__(kThreads)
    clear_diagonal_kernel(const T* matrix, int64_t size, Divisor apart, T* copy) {
  for_each(size * size, [&](int64_t i) { copy[i] = apart.remainder(i) == 0 ? T(0) : matrix[i]; });
}

// The sum over one block of the squares of what each element's f(i) returns.
template <class F>
__device__ inline void sum_squares(int64_t count, double* of_block, F&& f) {
  double sum = 0;
  for_each(count, [&](int64_t i) {
    const double value = f(i);
    sum += value * value;
  });
  sum = block_sum(sum);
  if (threadIdx.x == 0) of_block[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const T* values, int64_t count, double* squares) {
  sum_squares(count, squares, [&](int64_t i) { return values[i]; });
}

// sum = before + sign term, and the squares of the term.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_term_kernel(const T* before, const T* term, T sign, int64_t count, T* sum, double* squares) {
  sum_squares(count, squares, [&](int64_t i) {
    sum[i] = before[i] + sign * term[i];
    return term[i];
  });
}

// R = I - P in the place of P, [size, size], and its squares; the diagonal's elements lie size + 1 apart.
template <class T>
__global__ void __launch_bounds__(kThreads)
    missing_kernel(int64_t size, Divisor apart, T* matrix, double* squares) {
  sum_squares(size * size, squares, [&](int64_t i) {
    return matrix[i] = (apart.remainder(i) == 0 ? T(1) : T(0)) - matrix[i];
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const T* values, int64_t count, T* to) {
  for_each(count, [&](int64_t i) { to[i] += values[i]; });
}

// sqrt(sum of squares / (known + sum of whole)), 0 where both are 0: one length relative to another, from the
// squares of their blocks. In one block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    residual_kernel(const double* squares, int64_t blocks, double known, const double* whole,
                    int64_t whole_blocks, T* residual) {
  double off = 0, all = 0;
  for_each(blocks, [&](int64_t i) { off += squares[i]; });
  for_each(whole_blocks, [&](int64_t i) { all += whole[i]; });
  off = block_sum(off);
  all = block_sum(all) + known;
  if (threadIdx.x == 0) *residual = static_cast<T>(all > 0 ? std::sqrt(off) / std::sqrt(all) : all);
}

}  // namespace bpfree::cuda
