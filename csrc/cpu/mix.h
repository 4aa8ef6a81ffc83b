// Mixtures of basis images, and how an activation changes by them, across the cores.
#pragma once

#include "tensors.h"

namespace bpfree::cpu {

// f, and the factors of the sum and of the result.
template <class T>
struct MixedDifference {
  Activation activation = Activation::identity;
  T slope = T(0);
  T sum_gain = T(1);
  T gain = T(1);
};

// gain (f(z + s) - f(z)), with s = sum_gain times the sum over the classes of coefficients [batch, classes]
// times basis [classes, size]; without z gain s.
template <class T>
void mix(const Tensor& coefficients, const Tensor& basis, int64_t size, const MixedDifference<T>& what,
         const T* z, T* y) {
  const Kernels<T>& k = kernels<T>();
  const int64_t batch = coefficients.size(0), classes = coefficients.size(1);
  const Scratch<T> transposed(batch * classes);
  const T* from = data<T>(coefficients);
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t c = 0; c < classes; ++c) {
      transposed.get()[c * batch + n] = what.sum_gain * from[n * classes + c];
    }
  }
  const Mixture<T> mixture = {what.gain, transposed.get(), data<T>(basis), classes, batch, size};
  constexpr int64_t kElementsPerTask = 16384;
  const int64_t grain = kElementsPerTask / (batch * k.column_block + 1) + 1;
  torch::stable::parallel_for(
      0, blocks(size, k.column_block), grain, [&](int64_t begin, int64_t end) {
        const Scratch<T> scratch(k.mixed_scratch(classes));
        k.mixed_difference(what.activation, what.slope, z, mixture, y, begin, end, scratch.get());
      });
}

}  // namespace bpfree::cpu
