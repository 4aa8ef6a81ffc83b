// Invertible convolutions on the CPU (equations: bpfree_kernels/ops/invertible_conv.py).
//
// A work item owns some rows of one sample's input: it takes the outputs back through the activation, carries
// them down and corrects what overlaps while all of that is in its core's cache.
#include "invertible_conv.h"

#include "maps.h"

namespace bpfree::cpu {
namespace {

// Packs an inverse, and runs f(layer, sample, begin, end, scratch) over the rows of the maps below.
template <class T, class F>
void carry_down(const Windows& windows, const Tensor& inverse, Activation activation, double slope,
                const Tensor& to, F&& f) {
  const Kernels<T>& k = kernels<T>();
  const Scratch<T> packed(k.packed_elements(windows));
  torch::stable::parallel_for(0, windows.out, 16, [&](int64_t begin, int64_t end) {
    k.pack_kernel(windows, data<T>(inverse), begin, end, packed.get());
  });
  const InverseConv<T> layer = {windows, packed.get(), activation, static_cast<T>(slope), maps<T>(to)};
  // A row with its share of the outputs, which are more than it has values itself.
  const int64_t row = windows.width * windows.in + windows.columns * windows.out / windows.stride_h;
  for_rows<T>({windows.height, row, windows.stride_h}, to.size(0),
              [&](int64_t rows) { return k.inverse_scratch(windows, rows); },
              [&](int64_t sample, int64_t begin, int64_t end, T* scratch) {
                f(layer, sample, begin, end, scratch);
              });
}

template <class T>
Maps<const T> maybe_maps(const MaybeTensor& tensor) {
  return tensor ? maps<const T>(*tensor) : Maps<const T>{nullptr, false};
}

}  // namespace

Tensor invertible_conv_reconstruct(Tensor output, Tensor x, Tensor inverse, MaybeTensor bias,
                                   MaybeTensor target, MaybeTensor rate, int64_t stride_h,
                                   int64_t stride_w, int64_t pad_top, int64_t pad_left,
                                   int64_t dilation_h, int64_t dilation_w, int64_t groups,
                                   StringHandle activation, double slope) {
  const Windows windows =
      conv_windows(inverse, {x.size(2), x.size(3)}, {output.size(2), output.size(3)}, stride_h,
                   stride_w, pad_top, pad_left, dilation_h, dilation_w, groups);
  const Activation kind = parse_activation(take_string(activation));
  const Tensor result = new_maps(x, x.size(1), x.size(2), x.size(3));
  with_dtype(x, [&]<class T>() {
    const Reconstruction<T> from = {maps<const T>(output), maybe_maps<T>(target), data<T>(rate), data<T>(bias),
                             maps<const T>(x)};
    carry_down<T>(windows, inverse, kind, slope, result,
                  [&](const InverseConv<T>& layer, int64_t sample, int64_t begin, int64_t end, T* scratch) {
                    kernels<T>().reconstruct_rows(layer, from, sample, begin, end, scratch);
                  });
  });
  return result;
}

Tensor invertible_conv_error(Tensor signal, Tensor inverse, MaybeTensor gate, int64_t height,
                             int64_t width, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                             int64_t pad_left, int64_t dilation_h, int64_t dilation_w, int64_t groups,
                             StringHandle activation, double slope) {
  const Windows windows =
      conv_windows(inverse, {height, width}, {signal.size(2), signal.size(3)}, stride_h, stride_w, pad_top,
                   pad_left, dilation_h, dilation_w, groups);
  const Activation kind = parse_activation(take_string(activation));
  const Tensor result = new_maps(gate ? *gate : signal, inverse.size(1), height, width);
  with_dtype(signal, [&]<class T>() {
    const Maps<const T> from = maps<const T>(signal), gates = maybe_maps<T>(gate);
    carry_down<T>(windows, inverse, kind, slope, result,
                  [&](const InverseConv<T>& layer, int64_t sample, int64_t begin, int64_t end, T* scratch) {
                    kernels<T>().inverse_error_rows(layer, from, gates, sample, begin, end, scratch);
                  });
  });
  return result;
}

}  // namespace bpfree::cpu
