#pragma once

#include "../tensors.h"

namespace bpfree::cuda {

Tensor invertible_conv_reconstruct(Tensor output, Tensor x, Tensor inverse, MaybeTensor bias,
                                   MaybeTensor target, MaybeTensor rate, int64_t stride_h,
                                   int64_t stride_w, int64_t pad_top, int64_t pad_left,
                                   int64_t dilation_h, int64_t dilation_w, int64_t groups,
                                   StringHandle activation, double slope);

Tensor invertible_conv_error(Tensor signal, Tensor inverse, MaybeTensor gate, int64_t height,
                             int64_t width, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                             int64_t pad_left, int64_t dilation_h, int64_t dilation_w, int64_t groups,
                             StringHandle activation, double slope);

}  // namespace bpfree::cuda
