#pragma once

#include "tensors.h"

namespace bpfree::cpu {

void conv_step(Tensor signal, Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor feedback, double scale,
               double feedback_scale, int64_t stride_h, int64_t stride_w, int64_t pad_top,
               int64_t pad_left, int64_t dilation_h, int64_t dilation_w, int64_t groups,
               StringHandle optimizer, double lr, double beta1, double beta2, double eps,
               double weight_decay, bool nesterov, MaybeTensor lr_tensor, MaybeTensor weight_m,
               MaybeTensor weight_v, MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v,
               MaybeTensor bias_step, MaybeTensor feedback_m, MaybeTensor feedback_v,
               MaybeTensor feedback_step);

void conv_grad(Tensor signal, Tensor x, double scale, int64_t stride_h, int64_t stride_w, int64_t pad_top,
               int64_t pad_left, int64_t dilation_h, int64_t dilation_w, int64_t groups,
               Tensor grad_weight, MaybeTensor grad_bias, bool accumulate);

}  // namespace bpfree::cpu
