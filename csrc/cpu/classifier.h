#pragma once

#include "tensors.h"

namespace bpfree::cpu {

std::tuple<Tensor, Tensor, Tensor> classifier_forward(Tensor x, Tensor weight, MaybeTensor bias,
                                                      Tensor labels, StringHandle loss,
                                                      double margin, double off_class);

std::tuple<Tensor, Tensor, Tensor> classifier_step(
    Tensor x, Tensor weight, MaybeTensor bias, Tensor labels, StringHandle loss, double margin,
    double off_class, StringHandle optimizer, double lr, double beta1, double beta2, double eps,
    double weight_decay, bool nesterov, MaybeTensor lr_tensor, MaybeTensor weight_m,
    MaybeTensor weight_v, MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v,
    MaybeTensor bias_step);

std::tuple<Tensor, Tensor, Tensor> classifier_grad(Tensor x, Tensor weight, MaybeTensor bias,
                                                   Tensor labels, StringHandle loss,
                                                   double margin, double off_class,
                                                   Tensor grad_weight, MaybeTensor grad_bias,
                                                   bool accumulate);

}  // namespace bpfree::cpu
