#pragma once

#include "tensors.h"

namespace bpfree::cpu {

Tensor ekdaa_error(Tensor change, Tensor z, double beta, StringHandle upsample, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                   int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t dilation_h,
                   int64_t dilation_w, StringHandle activation, double slope);

Tensor ekdaa_linear_error(Tensor error, Tensor feedback, Tensor z, double beta,
                          StringHandle activation, double slope);

Tensor ekdaa_conv_error(Tensor error, Tensor feedback, Tensor z, double beta, int64_t stride_h,
                        int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t dilation_h,
                        int64_t dilation_w, int64_t groups, int64_t rows, int64_t columns,
                        StringHandle upsample, int64_t pool_h, int64_t pool_w, int64_t pool_stride_h,
                        int64_t pool_stride_w, int64_t pool_top, int64_t pool_left,
                        int64_t pool_dilation_h, int64_t pool_dilation_w, StringHandle activation,
                        double slope);

}  // namespace bpfree::cpu
