#pragma once

#include "tensors.h"

namespace bpfree::cpu {

Tensor drtp_linear_step(Tensor x, Tensor weight, MaybeTensor bias, Tensor feedback, Tensor labels,
                        StringHandle activation, double slope, StringHandle optimizer, double lr,
                        double beta1, double beta2, double eps, double weight_decay, bool nesterov,
                        MaybeTensor lr_tensor, MaybeTensor weight_m, MaybeTensor weight_v,
                        MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v,
                        MaybeTensor bias_step);

Tensor drtp_linear_grad(Tensor x, Tensor weight, MaybeTensor bias, Tensor feedback, Tensor labels,
                        StringHandle activation, double slope, Tensor grad_weight,
                        MaybeTensor grad_bias, bool accumulate);

std::tuple<Tensor, Tensor> drtp_signal(Tensor z, Tensor feedback, Tensor labels,
                                       StringHandle activation, double slope);

}  // namespace bpfree::cpu
