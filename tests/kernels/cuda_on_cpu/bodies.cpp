// The CUDA bodies of the ops, launches and all, as CPU bodies of a library "bpfree_on_cpu". What they ask of
// torch about CUDA is answered here.
#include "../../../csrc/cuda/inverse.cu"
#include "../../../csrc/cuda/invertible_conv.cu"

namespace {

bool stream_captures = false;  // as if a CUDA graph were captured
bool tensors_on_device = false;  // whether a learning rate or step counts as on the device, or on the CPU

}  // namespace

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = stream_captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// In the place of torch's own: linked with -Bsymbolic.
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return AOTI_TORCH_SUCCESS;
}

void torch_c10_cuda_free_error_msg(char*) {}

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

int32_t aoti_torch_device_type_cuda() { return tensors_on_device ? aoti_torch_device_type_cpu() : -1; }

// For the tests.
void set_stream_captures(bool captures) { stream_captures = captures; }

void set_tensors_on_device(bool on_device) { tensors_on_device = on_device; }

void divide(int64_t n, int64_t divisor, int64_t* quotient, int64_t* remainder) {
  const bpfree::cuda::Divisor by(divisor);
  *quotient = by.quotient(n);
  *remainder = by.remainder(n);
}

// The sums of squares of the blocks of a grid of any size.
void squares(const double* values, int64_t count, int64_t blocks, double* sums) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(bpfree::cuda::kThreads);
  cudaLaunchKernelEx(&config, bpfree::cuda::squares_kernel<double>, values, count, sums);
}

}  // extern "C"

STABLE_TORCH_LIBRARY_IMPL(bpfree_on_cpu, CPU, library) {
  library.impl("orthogonality", TORCH_BOX(&bpfree::cuda::orthogonality));
  library.impl("solve_nearly_orthogonal", TORCH_BOX(&bpfree::cuda::solve_nearly_orthogonal));
  library.impl("refine_inverse", TORCH_BOX(&bpfree::cuda::refine_inverse));
  library.impl("orthogonal_update", TORCH_BOX(&bpfree::cuda::orthogonal_update));
  library.impl("invertible_conv_reconstruct", TORCH_BOX(&bpfree::cuda::invertible_conv_reconstruct));
  library.impl("invertible_conv_error", TORCH_BOX(&bpfree::cuda::invertible_conv_error));
}
