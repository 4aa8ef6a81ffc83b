// Launching kernels: on the device of a tensor, in torch's current stream there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../tensors.h"
#include "device.cuh"

// A torch without CUDA has none of these. The library loads there all the same, and registers its ops.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace bpfree::cuda {

// As many blocks as a kernel has use for. More elements take more turns: no grid is too large, and what a
// second step sums over blocks stays small.
inline int64_t blocks_for(int64_t count) {
  constexpr int64_t kMost = 4096;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return blocks < kMost ? blocks : kMost;
}

class Stream {
 public:
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Runs a kernel over `count` elements: not at all for none.
  template <class... Parameters, class... Arguments>
  void launch(int64_t count, void (*kernel)(Parameters...), const Arguments&... arguments) const {
    if (count > 0) run(blocks_for(count), kernel, arguments...);
  }

  template <class... Parameters, class... Arguments>
  void launch_block(void (*kernel)(Parameters...), const Arguments&... arguments) const {
    run(1, kernel, arguments...);
  }

  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }

 private:
  template <class... Parameters, class... Arguments>
  void run(int64_t blocks, void (*kernel)(Parameters...), const Arguments&... arguments) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace bpfree::cuda
