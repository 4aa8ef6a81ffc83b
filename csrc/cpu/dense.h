// The forward product of a dense layer for the whole batch, across the cores.
#pragma once

#include "tensors.h"

namespace bpfree::cpu {

// z = x W^T + bias into z [batch, out], then `then(begin, end)` on samples whose z is complete. The smaller
// operand is packed, the larger one read once.
template <class T, class Then>
void dense_forward(const Tensor& x, const Tensor& weight, const T* bias, T* z, Then&& then) {
  const Kernels<T>& k = kernels<T>();
  const int64_t batch = x.size(0), out = weight.size(0);
  const bool pack_weight = out < batch;
  const Scratch<T> panels(panel_elements<T>(pack_weight ? weight : x));
  const Input<T> packed = pack_input<T>(pack_weight ? weight : x, panels);
  if (pack_weight) {
    torch::stable::parallel_for(0, batch, k.row_block / 2, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(k.forward_scratch(out));
      k.forward_samples(data<T>(x), packed, bias, z, begin, end, scratch.get());
      then(begin, end);
    });
    return;
  }
  torch::stable::parallel_for(0, blocks(out, k.row_block), 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(k.forward_scratch(batch));
    k.forward_rows(packed, data<T>(weight), bias, out, z, begin, end, scratch.get());
  });
  constexpr int64_t kElementsPerTask = 4096;
  torch::stable::parallel_for(0, batch, kElementsPerTask / out + 1, then);
}

}  // namespace bpfree::cpu
