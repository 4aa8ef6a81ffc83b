// Invertible convolutions on CUDA devices (equations: bpfree_kernels/ops/invertible_conv.py).
//
// Two kernels and a product between them, which is torch's: what enters is taken back through the activation
// on the way to the product, and what overlaps is corrected while the patches are folded.
#include "invertible_conv.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "invertible_conv.cuh"
#include "launch.h"

namespace bpfree::cuda {
namespace {

// Calls f<T>() as the dtype of maps says.
template <class F>
void with_map_dtype(const Tensor& maps, F&& f) {
  using torch::headeronly::ScalarType;
  switch (maps.scalar_type()) {
    case ScalarType::BFloat16: return f.template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Half: return f.template operator()<torch::headeronly::Half>();
    default: return with_dtype(maps, f);
  }
}

// The order of maps, channels last where it is no matter.
MapOrder order_of(const Tensor& maps) {
  const int64_t size = maps.size(2) * maps.size(3);
  return {maps.size(1), size, size == 1 || channels_last(maps)};
}

// The memory of maps, which have been checked to have no gaps by `order_of`.
template <class T>
T* memory(const Tensor& maps) {
  return static_cast<T*>(maps.data_ptr());
}

// The values that `enter` makes of maps of this order, as [channels, positions].
template <class T, class Enter>
Tensor columns(const Stream& stream, const Enter& enter, const Tensor& maps, const MapOrder& order) {
  const int64_t channels = maps.size(1), positions = maps.size(0) * maps.size(2) * maps.size(3);
  const Tensor entering = order.channels_last ? new_output(maps, {positions, channels})
                                              : new_output(maps, {channels, positions});
  stream.launch(maps.numel(), enter_kernel<T, Enter>, enter, order, maps.size(0), data<T>(entering));
  return order.channels_last ? torch::stable::transpose(entering, 0, 1) : entering;
}

// The columns of maps that lie with the channels last: the maps' own memory.
Tensor own_columns(const Tensor& maps) {
  const Tensor rows = torch::stable::transpose(torch::stable::transpose(maps, 1, 2), 2, 3);
  return torch::stable::transpose(torch::stable::flatten(rows, 0, 2), 0, 1);
}

// Folds W^-T's product with columns into maps of the size and order of `to`.
template <class T, class Finish>
void fold(const Stream& stream, const Tensor& columns, const Tensor& inverse, const Windows& windows,
          const Finish& finish, const Tensor& to) {
  const Tensor matrix = torch::stable::transpose(torch::stable::flatten(inverse, 1, -1), 0, 1);
  const Tensor patches = torch::stable::matmul(matrix, columns);
  stream.launch(to.numel(), fold_kernel<T, Finish>, data<T>(patches), windows, to.size(0), finish,
                order_of(to), memory<T>(to));
}

}  // namespace

Tensor invertible_conv_reconstruct(Tensor output, Tensor x, Tensor inverse, MaybeTensor bias,
                                   MaybeTensor target, MaybeTensor rate, int64_t stride_h,
                                   int64_t stride_w, int64_t pad_top, int64_t pad_left,
                                   int64_t dilation_h, int64_t dilation_w, int64_t,
                                   StringHandle activation, double slope) {
  const Activation kind = parse_activation(take_string(activation));
  const Stream stream(x);
  const Tensor result = new_maps(x, x.size(1), x.size(2), x.size(3));
  const MapOrder order = order_of(output);
  const Windows windows = {x.size(3), output.size(2), output.size(3), inverse.size(2),
                           inverse.size(3), stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w};
  with_map_dtype(x, [&]<class T>() {
    const bool nudged = target && rate;
    const Unfold<T> enter = {memory<T>(output),
                             nudged ? memory<T>(*target) : nullptr,
                             nudged ? data<T>(*rate) : nullptr,
                             data<T>(bias),
                             nudged ? order_of(*target) : order,
                             kind,
                             static_cast<Wide<T>>(slope),
                             static_cast<Wide<T>>(1 / slope)};
    const TakeOff<T> finish = {memory<T>(x)};
    fold<T>(stream, columns<T>(stream, enter, output, order), inverse, windows, finish, result);
  });
  return result;
}

Tensor invertible_conv_error(Tensor signal, Tensor inverse, MaybeTensor gate, int64_t height,
                             int64_t width, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                             int64_t pad_left, int64_t dilation_h, int64_t dilation_w, int64_t,
                             StringHandle activation, double slope) {
  const Activation kind = parse_activation(take_string(activation));
  const Stream stream(signal);
  const Tensor result = new_maps(gate ? *gate : signal, inverse.size(1), height, width);
  const MapOrder order = order_of(signal);
  const Windows windows = {width, signal.size(2), signal.size(3), inverse.size(2),
                           inverse.size(3), stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w};
  with_map_dtype(signal, [&]<class T>() {
    const Gate<T> finish = {gate ? memory<T>(*gate) : nullptr, kind, static_cast<Wide<T>>(slope)};
    const Tensor entering = order.channels_last
                                ? own_columns(signal)
                                : columns<T>(stream, Same<T>{memory<T>(signal)}, signal, order);
    fold<T>(stream, entering, inverse, windows, finish, result);
  });
  return result;
}

}  // namespace bpfree::cuda
