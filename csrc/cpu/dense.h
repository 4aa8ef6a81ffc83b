#pragma once

#include "tensors.h"

namespace bpfree::cpu {

std::tuple<Tensor, Tensor> dense_forward(Tensor x, Tensor weight, MaybeTensor bias,
                                         StringHandle activation, double slope);

void dense_step(
    Tensor post, Tensor pre, Tensor weight, MaybeTensor bias, MaybeTensor feedback, double scale,
    double feedback_scale, StringHandle optimizer, double lr, double beta1, double beta2, double eps,
    double weight_decay, bool nesterov, MaybeTensor lr_tensor, MaybeTensor weight_m,
    MaybeTensor weight_v, MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v,
    MaybeTensor bias_step, MaybeTensor feedback_m, MaybeTensor feedback_v,
    MaybeTensor feedback_step);

void dense_grad(Tensor post, Tensor pre, double scale, Tensor grad_weight, MaybeTensor grad_bias,
                bool accumulate);

}  // namespace bpfree::cpu
