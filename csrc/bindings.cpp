// Registers the CPU bodies with torch. The schemas live in Python (bpfree_kernels/ops), so that the ops
// exist with no binary; this file is the only one that knows an op's name.
#include "cpu/classifier.h"
#include "cpu/conv.h"
#include "cpu/dense.h"
#include "cpu/drtp.h"
#include "cpu/ekdaa.h"
#include "cpu/inverse.h"
#include "cpu/invertible_conv.h"
#include "cpu/local_conv.h"
#include "cpu/pepita.h"
#include "cpu/update.h"

STABLE_TORCH_LIBRARY_IMPL(bpfree, CPU, library) {
  library.impl("drtp_linear_step", TORCH_BOX(&bpfree::cpu::drtp_linear_step));
  library.impl("drtp_linear_grad", TORCH_BOX(&bpfree::cpu::drtp_linear_grad));
  library.impl("drtp_signal", TORCH_BOX(&bpfree::cpu::drtp_signal));
  library.impl("dense_forward", TORCH_BOX(&bpfree::cpu::dense_forward));
  library.impl("dense_step", TORCH_BOX(&bpfree::cpu::dense_step));
  library.impl("dense_grad", TORCH_BOX(&bpfree::cpu::dense_grad));
  library.impl("pepita_linear_step", TORCH_BOX(&bpfree::cpu::pepita_linear_step));
  library.impl("pepita_linear_grad", TORCH_BOX(&bpfree::cpu::pepita_linear_grad));
  library.impl("pepita_difference", TORCH_BOX(&bpfree::cpu::pepita_difference));
  library.impl("pepita_difference_", TORCH_BOX(&bpfree::cpu::pepita_difference_));
  library.impl("pepita_max_pool", TORCH_BOX(&bpfree::cpu::pepita_max_pool));
  library.impl("classifier_forward", TORCH_BOX(&bpfree::cpu::classifier_forward));
  library.impl("classifier_step", TORCH_BOX(&bpfree::cpu::classifier_step));
  library.impl("classifier_grad", TORCH_BOX(&bpfree::cpu::classifier_grad));
  library.impl("local_conv_forward", TORCH_BOX(&bpfree::cpu::local_conv_forward));
  library.impl("local_conv_feedback", TORCH_BOX(&bpfree::cpu::local_conv_feedback));
  library.impl("local_conv_grad", TORCH_BOX(&bpfree::cpu::local_conv_grad));
  library.impl("local_conv_step", TORCH_BOX(&bpfree::cpu::local_conv_step));
  library.impl("conv_step", TORCH_BOX(&bpfree::cpu::conv_step));
  library.impl("conv_grad", TORCH_BOX(&bpfree::cpu::conv_grad));
  library.impl("ekdaa_error", TORCH_BOX(&bpfree::cpu::ekdaa_error));
  library.impl("ekdaa_linear_error", TORCH_BOX(&bpfree::cpu::ekdaa_linear_error));
  library.impl("ekdaa_conv_error", TORCH_BOX(&bpfree::cpu::ekdaa_conv_error));
  library.impl("orthogonality", TORCH_BOX(&bpfree::cpu::orthogonality));
  library.impl("solve_nearly_orthogonal", TORCH_BOX(&bpfree::cpu::solve_nearly_orthogonal));
  library.impl("refine_inverse", TORCH_BOX(&bpfree::cpu::refine_inverse));
  library.impl("orthogonal_update", TORCH_BOX(&bpfree::cpu::orthogonal_update));
  library.impl("invertible_conv_reconstruct", TORCH_BOX(&bpfree::cpu::invertible_conv_reconstruct));
  library.impl("invertible_conv_error", TORCH_BOX(&bpfree::cpu::invertible_conv_error));
  library.impl("apply_update", TORCH_BOX(&bpfree::cpu::apply_update));
}
