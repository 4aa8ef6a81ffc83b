#pragma once

#include "tensors.h"

namespace bpfree::cpu {

std::tuple<Tensor, Tensor> local_conv_forward(Tensor x, Tensor weight, MaybeTensor bias,
                                              StringHandle activation, double slope,
                                              int64_t stride_h, int64_t stride_w, int64_t pad_top,
                                              int64_t pad_left, int64_t dilation_h,
                                              int64_t dilation_w, int64_t groups);

Tensor local_conv_feedback(Tensor signal, Tensor weight, MaybeTensor gate, StringHandle activation,
                           double slope, int64_t height, int64_t width, int64_t stride_h,
                           int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t dilation_h,
                           int64_t dilation_w, int64_t groups);

void local_conv_grad(Tensor signal, Tensor x, MaybeTensor mask, double scale, int64_t stride_h,
                     int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t dilation_h,
                     int64_t dilation_w, int64_t groups, Tensor grad_weight, MaybeTensor grad_bias,
                     bool accumulate);

void local_conv_step(Tensor signal, Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor feedback,
                     MaybeTensor weight_mask, MaybeTensor feedback_mask, double scale,
                     int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_left,
                     int64_t dilation_h, int64_t dilation_w, int64_t groups, StringHandle optimizer,
                     double lr, double beta1, double beta2, double eps, double weight_decay,
                     bool nesterov, MaybeTensor lr_tensor, MaybeTensor weight_m, MaybeTensor weight_v,
                     MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v,
                     MaybeTensor bias_step, MaybeTensor feedback_m, MaybeTensor feedback_v,
                     MaybeTensor feedback_step);

}  // namespace bpfree::cpu
