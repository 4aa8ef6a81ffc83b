// What the kernels use of CUDA's runtime, on the CPU: the same sources, compiled by a C++ compiler, run block
// after block, the threads of a block as fibres that take turns at every __syncthreads().
//
// Stands in for CUDA's header of this name. It shows what kernels compute, not how fast, nor what a GPU does
// with threads that run at the same time.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(threads)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace cuda_on_cpu {

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool ended = false;
};

inline ucontext_t scheduler;
inline Fibre* running;
inline const std::function<void()>* thread_body;

inline void run_thread() {
  (*thread_body)();
  running->ended = true;  // and on to uc_link
}

inline void wait_for_others() { swapcontext(&running->context, &scheduler); }

inline void run_block(const std::function<void()>& body) {
  static std::vector<Fibre> fibres;
  fibres.resize(blockDim.x);
  thread_body = &body;
  for (Fibre& fibre : fibres) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = &scheduler;
    fibre.ended = false;
    makecontext(&fibre.context, run_thread, 0);
  }
  for (size_t ended = 0; ended < fibres.size();) {
    if (ended != 0) throw std::logic_error("some threads of a block have ended, others wait for them");
    for (unsigned i = 0; i < fibres.size(); ++i) {
      threadIdx.x = i;
      running = &fibres[i];
      swapcontext(&scheduler, &running->context);
      ended += running->ended;
    }
  }
}

}  // namespace cuda_on_cpu

#define __syncthreads() cuda_on_cpu::wait_for_others()

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->gridDim.x == 0) throw std::logic_error("a launch of no blocks is an error");
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    cuda_on_cpu::run_block([&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
