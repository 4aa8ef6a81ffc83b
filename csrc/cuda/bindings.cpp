// Registers the CUDA bodies with torch, as csrc/bindings.cpp does with the CPU's.
#include "inverse.h"
#include "invertible_conv.h"

STABLE_TORCH_LIBRARY_IMPL(bpfree, CUDA, library) {
  library.impl("orthogonality", TORCH_BOX(&bpfree::cuda::orthogonality));
  library.impl("solve_nearly_orthogonal", TORCH_BOX(&bpfree::cuda::solve_nearly_orthogonal));
  library.impl("refine_inverse", TORCH_BOX(&bpfree::cuda::refine_inverse));
  library.impl("orthogonal_update", TORCH_BOX(&bpfree::cuda::orthogonal_update));
  library.impl("invertible_conv_reconstruct", TORCH_BOX(&bpfree::cuda::invertible_conv_reconstruct));
  library.impl("invertible_conv_error", TORCH_BOX(&bpfree::cuda::invertible_conv_error));
}
