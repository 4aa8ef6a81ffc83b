// Kernels around the product of an invertible convolution: what enters it, and what its patches add up to.
//
// The product takes signals [out, positions] to patches [in * kernel_h * kernel_w, positions], positions
// being those of the whole batch: neighbours on a map are neighbours in memory, whichever way the maps lie.
#pragma once

#include "activation.cuh"
#include "device.cuh"
#include "divide.cuh"

namespace bpfree::cuda {

// Where the windows of a convolution lie on maps: rows x columns positions.
struct Windows {
  Divisor width;  // of the maps
  int64_t rows, columns;
  int64_t kernel_h, kernel_w;
  Divisor stride_h, stride_w;
  int64_t pad_top, pad_left, dilation_h, dilation_w;
};

// Maps [batch, channels, size] with the channels first or last in memory; size is height * width.
struct MapOrder {
  Divisor channels, size;
  bool channels_last;

  __device__ int64_t at(int64_t sample, int64_t channel, int64_t pixel) const {
    return channels_last ? (sample * size.value() + pixel) * channels.value() + channel
                         : (sample * channels.value() + channel) * size.value() + pixel;
  }
};

// A signal as it is.
template <class T>
struct Same {
  const T* signal;

  __device__ Wide<T> operator()(int64_t offset, int64_t, int64_t, int64_t) const {
    return static_cast<Wide<T>>(signal[offset]);
  }
};

// f^-1(u) - b with u = a + rate f'^2 (t - a); f' by the sign of a, which f keeps.
template <class T>
struct Unfold {
  const T* output;  // a
  const T* target;  // t, or null
  const T* rate;    // [batch]; null without a target
  const T* bias;    // [out] or null
  MapOrder target_order;
  Activation activation;
  Wide<T> slope, inverse_slope;

  __device__ Wide<T> operator()(int64_t offset, int64_t sample, int64_t channel, int64_t pixel) const {
    using W = Wide<T>;
    W u = static_cast<W>(output[offset]);
    if (target) {
      const W gain = derivative(activation, u, slope);
      const W t = static_cast<W>(target[target_order.at(sample, channel, pixel)]);
      u += static_cast<W>(rate[sample]) * gain * gain * (t - u);
    }
    const W z = inverse_activation(activation, u, inverse_slope);
    return bias ? z - static_cast<W>(bias[channel]) : z;
  }
};

// Writes what enters the product, in the order of the maps it comes from: [out, batch * size], or with the
// channels last [batch * size, out].
template <class T, class Enter>
__global__ void __launch_bounds__(kThreads)
    enter_kernel(Enter enter, MapOrder from, int64_t batch, T* to) {
  for_each(batch * from.channels.value() * from.size.value(), [&](int64_t offset) {
    int64_t sample, channel, pixel, target = offset;
    if (from.channels_last) {
      const int64_t position = from.channels.quotient(offset);
      channel = from.channels.remainder(offset);
      sample = from.size.quotient(position);
      pixel = from.size.remainder(position);
    } else {
      const int64_t plane = from.size.quotient(offset);
      pixel = from.size.remainder(offset);
      sample = from.channels.quotient(plane);
      channel = from.channels.remainder(plane);
      target = (channel * batch + sample) * from.size.value() + pixel;
    }
    to[target] = static_cast<T>(enter(offset, sample, channel, pixel));
  });
}

// x^ = patches - (n - 1) x.
template <class T>
struct TakeOff {
  const T* x;

  __device__ Wide<T> operator()(Wide<T> sum, int64_t times, int64_t offset) const {
    return sum - static_cast<Wide<T>>(times - 1) * static_cast<Wide<T>>(x[offset]);
  }
};

// The error at a unit's z: times f'(gate), which may be null.
template <class T>
struct Gate {
  const T* gate;
  Activation activation;
  Wide<T> slope;

  __device__ Wide<T> operator()(Wide<T> sum, int64_t, int64_t offset) const {
    if (!gate) return sum;
    return sum * derivative(activation, static_cast<Wide<T>>(gate[offset]), slope);
  }
};

// The position along one axis whose window reaches `reach` past its first element, or -1.
__device__ inline int64_t position(int64_t reach, const Divisor& stride, int64_t positions) {
  if (reach < 0) return -1;
  const int64_t at = stride.quotient(reach);
  return at < positions && at * stride.value() == reach ? at : -1;
}

// Sums for every value of a map what the patches of all windows that hold it say of it.
template <class T, class Finish>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const T* patches, Windows w, int64_t batch, Finish finish, MapOrder order, T* to) {
  const int64_t area = w.rows * w.columns;
  for_each(batch * order.channels.value() * order.size.value(), [&](int64_t i) {
    const int64_t plane = order.size.quotient(i), pixel = order.size.remainder(i);
    const int64_t sample = order.channels.quotient(plane), channel = order.channels.remainder(plane);
    const int64_t bottom = w.width.quotient(pixel) + w.pad_top;
    const int64_t right = w.width.remainder(pixel) + w.pad_left;
    Wide<T> sum = 0;
    int64_t times = 0;
    for (int64_t tap_h = 0; tap_h < w.kernel_h; ++tap_h) {
      const int64_t row = position(bottom - tap_h * w.dilation_h, w.stride_h, w.rows);
      if (row < 0) continue;
      for (int64_t tap_w = 0; tap_w < w.kernel_w; ++tap_w) {
        const int64_t column = position(right - tap_w * w.dilation_w, w.stride_w, w.columns);
        if (column < 0) continue;
        const int64_t value = (channel * w.kernel_h + tap_h) * w.kernel_w + tap_w;
        sum += static_cast<Wide<T>>(
            patches[(value * batch + sample) * area + row * w.columns + column]);
        ++times;
      }
    }
    const int64_t offset = order.at(sample, channel, pixel);
    to[offset] = static_cast<T>(finish(sum, times, offset));
  });
}

}  // namespace bpfree::cuda
