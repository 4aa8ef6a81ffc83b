#pragma once

#include "tensors.h"

namespace bpfree::cpu {

Tensor pepita_linear_step(
    Tensor z, Tensor pre, Tensor change, MaybeTensor feedback, MaybeTensor mask, Tensor weight,
    MaybeTensor bias, StringHandle activation, double slope, StringHandle optimizer,
    double lr, double beta1, double beta2, double eps, double weight_decay, bool nesterov,
    MaybeTensor lr_tensor, MaybeTensor weight_m, MaybeTensor weight_v,
    MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v, MaybeTensor bias_step);

Tensor pepita_linear_grad(Tensor z, Tensor pre, Tensor change, MaybeTensor feedback,
                          MaybeTensor mask, Tensor weight, StringHandle activation, double slope,
                          Tensor grad_weight, MaybeTensor grad_bias, bool accumulate);

Tensor pepita_difference(Tensor z, Tensor change, MaybeTensor basis, StringHandle activation,
                         double slope);

void pepita_difference_(Tensor z, Tensor change, MaybeTensor basis, StringHandle activation,
                        double slope);

Tensor pepita_max_pool(Tensor y, MaybeTensor change, int64_t rows, int64_t columns, int64_t kernel_h,
                       int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                       int64_t pad_left, int64_t dilation_h, int64_t dilation_w);

}  // namespace bpfree::cpu
