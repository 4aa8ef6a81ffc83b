// Kernels around the products of an inverse: identities, the terms of a series, and how far off they are.
//
// Norms are summed in two steps, over each block and over all blocks, in an order that depends on nothing but
// the number of elements.
#pragma once

#include "device.cuh"

namespace bpfree::cuda {

// G <- G - I of a matrix [size, size].
template <class T>
__global__ void __launch_bounds__(kThreads) subtract_identity_kernel(int64_t size, T* matrix) {
  for_each(size, [&](int64_t i) { matrix[i * (size + 1)] -= T(1); });
}

// A copy of a matrix [size, size] with zeros on the diagonal.
template <class T>
__global__ void __launch_bounds__(kThreads)
    clear_diagonal_kernel(const T* matrix, int64_t size, T* copy) {
  for_each(size * size, [&](int64_t i) { copy[i] = i % (size + 1) == 0 ? T(0) : matrix[i]; });
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

// R = I - P in the place of P, [size, size], and its squares.
template <class T>
__global__ void __launch_bounds__(kThreads) missing_kernel(int64_t size, T* matrix, double* squares) {
  sum_squares(size * size, squares, [&](int64_t i) {
    return matrix[i] = (i % (size + 1) == 0 ? T(1) : T(0)) - matrix[i];
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const T* values, int64_t count, T* to) {
  for_each(count, [&](int64_t i) { to[i] += values[i]; });
}

// The length of a vector relative to another's, from the squares of their blocks; 0 where both are 0. In one
// block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    residual_kernel(const double* squares, int64_t blocks, const double* whole, int64_t whole_blocks,
                    T* residual) {
  double off = 0, all = 0;
  for_each(blocks, [&](int64_t i) { off += squares[i]; });
  for_each(whole_blocks, [&](int64_t i) { all += whole[i]; });
  off = std::sqrt(block_sum(off));
  all = std::sqrt(block_sum(all));
  if (threadIdx.x == 0) *residual = static_cast<T>(all > 0 ? off / all : all);
}

}  // namespace bpfree::cuda
