// The products of a dense layer for the whole batch, across the cores.
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
  torch::stable::parallel_for(0, batch, kElementsPerTask / (out + 1) + 1, then);
}

// Lets a layer learn: signal^T pre to its weight's targets, the summed signal to its bias's.
template <class T>
void dense_update(const T* signal, int64_t out, const Tensor& pre, const Targets<T>& to_weight,
                  const Target<T>& to_bias) {
  const Kernels<T>& k = kernels<T>();
  const Input<T> input = {data<T>(pre), nullptr, pre.size(0), pre.size(1)};
  torch::stable::parallel_for(
      0, blocks(input.in, k.column_block), 4, [&](int64_t begin, int64_t end) {
        const Scratch<T> scratch(k.update_scratch(input.batch));
        k.update_columns(signal, out, input, to_weight, begin, end, scratch.get());
      });
  if (to_bias.value) k.update_bias(signal, out, out, input.batch, to_bias);
}

}  // namespace bpfree::cpu
