// What the CUDA kernels share: the type of a sum, the loop over elements, and the sum over a block.
//
// Device code (*.cuh) knows nothing of torch. Every kernel runs in blocks of kThreads threads, and is right
// for any number of blocks.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace bpfree::cuda {

constexpr int kThreads = 256;

// The type in which values of type T are computed and summed: Wide<T>.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// Calls f(i) for every i in [0, count): neighbours in neighbouring threads, in an order of its own.
template <class F>
__device__ inline void for_each(int64_t count, F&& f) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) f(i);
}

// The sum of a value of each thread of the block, for its first thread; always in the same order.
__device__ inline double block_sum(double value) {
  __shared__ double sums[kThreads];
  __syncthreads();  // the sums before these have been read
  sums[threadIdx.x] = value;
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

}  // namespace bpfree::cuda
