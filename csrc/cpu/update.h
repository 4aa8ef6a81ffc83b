#pragma once

#include "tensors.h"

namespace bpfree::cpu {

void apply_update(Tensor param, Tensor grad, double scale, double max_norm, StringHandle optimizer,
                  double lr, double beta1, double beta2, double eps, double weight_decay,
                  bool nesterov, MaybeTensor lr_tensor, MaybeTensor m, MaybeTensor v,
                  MaybeTensor step);

}  // namespace bpfree::cpu
