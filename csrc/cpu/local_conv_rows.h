// The kernels of locally connected layers. No window is copied: a product reads its input where it lies, one
// value at a time, against vectors of output channels.
#pragma once

#include "local_windows.h"
#include "tiles.h"

namespace bpfree::cpu::BPFREE_ISA {

// The tile of the feedback, whose vectors run along the sum: samples x channels.
inline constexpr int kFeedbackChannels = kVectorRegisters == 32 ? 4 : 3;
inline constexpr int kFeedbackSamples = kTile / kFeedbackChannels;

inline int64_t window_rows(const Windows& windows) {
  return windows.kernel_h * windows.kernel_w * (windows.in / windows.groups);
}

// z of some samples at one position: the values under its window times the weight's rows.
template <class T, int rows, int vectors>
inline void window_tile(const T* x, int64_t sample_stride, const WindowElements& elements,
                        const T* weight, const T* bias, int64_t out, FirstLanes<T> last, T* z) {
  Vec<T> acc[rows][vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const Vec<T> start = !bias              ? Vec<T>{}
                         : v == vectors - 1 ? load(bias + v * kLanes<T>, last)
                                            : load(bias + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) acc[r][v] = start;
  }
  const int64_t* offsets = elements.offsets();
  const int64_t* weight_rows = elements.rows();
  for (int64_t i = 0; i < elements.count(); ++i) {
    const T* from = weight + weight_rows[i] * out;
    Vec<T> w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      w[v] = v == vectors - 1 ? load(from + v * kLanes<T>, last) : load(from + v * kLanes<T>);
    }
    const T* at = x + offsets[i];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec<T> value = splat(at[r * sample_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) acc[r][v] += value * w[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      T* to = z + r * out + v * kLanes<T>;
      if (v == vectors - 1) {
        store(to, acc[r][v], last);
      } else {
        store(to, acc[r][v]);
      }
    }
  }
}

template <class T>
int64_t local_forward_scratch(const Windows& windows, int64_t batch, int64_t positions) {
  return index_elements<T>(2 * window_rows(windows)) + positions * batch * windows.out;
}

template <class T>
void local_forward(const LocalForward<T>& layer, int64_t begin, int64_t end, T* scratch) {
  const Windows& windows = layer.windows;
  const int64_t out = windows.out, per_group = out / windows.groups;
  WindowElements elements(windows, layer.batch, reinterpret_cast<int64_t*>(scratch));
  T* run = scratch + index_elements<T>(2 * window_rows(windows));
  for (int64_t p = begin; p < end; ++p) {
    elements.move_to(p);
    T* z = run + (p - begin) * layer.batch * out;
    for (int64_t group = 0; group < windows.groups; ++group) {
      const T* x = layer.x + elements.origin(group);
      for (int64_t c = 0; c < per_group; c += kTileVectors * kLanes<T>) {
        const ColumnTile<T> tile(group * per_group + c, per_group - c);
        const T* weight = layer.weight + p * window_rows(windows) * out + tile.column;
        const T* bias = layer.bias ? layer.bias + p * out + tile.column : nullptr;
        for_row_tiles(layer.batch, tile.vectors, [&]<int rows, int vectors>(int64_t n) {
          window_tile<T, rows, vectors>(x + n * windows.in, windows.in, elements, weight, bias,
                                        out, tile.last, z + n * out + tile.column);
        });
      }
    }
  }
  with_activation(layer.activation, [&]<Activation kind>() {
    for_maps<T>(run, layer.batch, out, windows.rows * windows.columns, layer.z.channels_last, begin,
                end, [&](int64_t offset, Vec<T> z, int64_t lanes) {
                  store_lanes(layer.z.data + offset, z, lanes);
                  if (layer.y) {
                    store_lanes(layer.y + offset, activate<kind, T>(z, layer.slope).value, lanes);
                  }
                });
  });
}

// The positions whose windows hold an input pixel: where their signals and their weights lie.
class WindowsOver {
 public:
  // `memory` holds two values for each element of a kernel.
  WindowsOver(const Windows& windows, int64_t batch, int64_t* memory)
      : windows_(windows),
        batch_(batch),
        signals_(memory),
        weights_(memory + windows.kernel_h * windows.kernel_w) {}

  void move_to(int64_t pixel) {
    const int64_t row = pixel / windows_.width + windows_.pad_top;
    const int64_t column = pixel % windows_.width + windows_.pad_left;
    const int64_t position_size = window_rows(windows_) * windows_.out;
    const int64_t element_size = windows_.in / windows_.groups * windows_.out;
    count_ = 0;
    for (int64_t i = 0; i < windows_.kernel_h; ++i) {
      const int64_t down = row - i * windows_.dilation_h;
      if (down < 0 || down % windows_.stride_h || down / windows_.stride_h >= windows_.rows) continue;
      for (int64_t j = 0; j < windows_.kernel_w; ++j) {
        const int64_t across = column - j * windows_.dilation_w;
        if (across < 0 || across % windows_.stride_w) continue;
        if (across / windows_.stride_w >= windows_.columns) continue;
        const int64_t p = down / windows_.stride_h * windows_.columns + across / windows_.stride_w;
        signals_[count_] = p * batch_ * windows_.out;
        weights_[count_] = p * position_size + (i * windows_.kernel_w + j) * element_size;
        ++count_;
      }
    }
  }

  int64_t count() const { return count_; }
  const int64_t* signals() const { return signals_; }
  const int64_t* weights() const { return weights_; }

 private:
  const Windows& windows_;
  int64_t batch_;
  int64_t *signals_, *weights_;
  int64_t count_ = 0;
};

// Sums over the output channels of a group, `width` of them, for some samples and input channels.
template <class T, int samples, int channels>
inline void feedback_tile(const T* signal, const T* weight, const WindowsOver& over, int64_t out,
                          int64_t width, T* to, int64_t to_stride) {
  Vec<T> acc[samples][channels] = {};
  const int64_t whole = (width - 1) / kLanes<T> * kLanes<T>;
  const FirstLanes<T> last(width - whole);
  const int64_t count = width ? over.count() : 0;  // without outputs nothing may be read
  for (int64_t i = 0; i < count; ++i) {
    const T* w = weight + over.weights()[i];
    const T* s = signal + over.signals()[i];
    const auto add = [&](auto&& read) __attribute__((always_inline)) {
      Vec<T> ws[channels];
#pragma GCC unroll 8
      for (int c = 0; c < channels; ++c) ws[c] = read(w + c * out);
#pragma GCC unroll 8
      for (int n = 0; n < samples; ++n) {
        const Vec<T> value = read(s + n * out);
#pragma GCC unroll 8
        for (int c = 0; c < channels; ++c) acc[n][c] += value * ws[c];
      }
    };
    for (int64_t o = 0; o < whole; o += kLanes<T>) add([&](const T* from) { return load(from + o); });
    add([&](const T* from) { return load(from + whole, last); });
  }
#pragma GCC unroll 8
  for (int n = 0; n < samples; ++n) {
#pragma GCC unroll 8
    for (int c = 0; c < channels; ++c) to[n * to_stride + c] = sum<T>(acc[n][c]);
  }
}

template <class T>
int64_t local_feedback_scratch(const Windows& windows, int64_t batch, int64_t positions) {
  return index_elements<T>(2 * windows.kernel_h * windows.kernel_w) + positions * batch * windows.in;
}

template <class T>
void local_feedback(const LocalFeedback<T>& layer, int64_t begin, int64_t end, T* scratch) {
  const Windows& windows = layer.windows;
  const int64_t in = windows.in, out = windows.out;
  const int64_t in_group = in / windows.groups, out_group = out / windows.groups;
  WindowsOver over(windows, layer.batch, reinterpret_cast<int64_t*>(scratch));
  T* run = scratch + index_elements<T>(2 * windows.kernel_h * windows.kernel_w);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    over.move_to(pixel);
    T* change = run + (pixel - begin) * layer.batch * in;
    for (int64_t n = 0; n < layer.batch; n += kFeedbackSamples) {
      with_count<kFeedbackSamples>(layer.batch - n, [&]<int samples>() {
        for (int64_t channel = 0; channel < in; channel += in_group) {
          const int64_t column = channel / in_group * out_group;
          for (int64_t c = 0; c < in_group; c += kFeedbackChannels) {
            with_count<kFeedbackChannels>(in_group - c, [&]<int channels>() {
              feedback_tile<T, samples, channels>(
                  layer.signal + n * out + column, layer.weight + c * out + column, over, out,
                  out_group, change + n * in + channel + c, in);
            });
          }
        }
      });
    }
  }
  with_activation(layer.activation, [&]<Activation kind>() {
    for_maps<T>(run, layer.batch, in, windows.height * windows.width, layer.change.channels_last,
                begin, end, [&](int64_t offset, Vec<T> values, int64_t lanes) {
                  if (layer.gate) {
                    const Vec<T> field = load_lanes(layer.gate + offset, lanes);
                    values *= activate<kind, T>(field, layer.slope).derivative;
                  }
                  store_lanes(layer.change.data + offset, values, lanes);
                });
  });
}

// Sends the gradient of the weight rows `which` [rows] to the weight and to the feedback.
template <class T>
void learn_rows(const LocalLearning<T>& layer, const T* g, int64_t g_stride, const int64_t* which,
                int64_t rows, int64_t width, int64_t at) {
  const int64_t out = layer.windows.out;
  for (const Target<T>* to : {&layer.to_weight, &layer.to_feedback}) {
    if (!to->value) continue;
    if (which[rows - 1] - which[0] == rows - 1) {
      apply_tile(g, g_stride, rows, width, to->at(at + which[0] * out), out);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      apply_tile(g + r * g_stride, g_stride, 1, width, to->at(at + which[r] * out), out);
    }
  }
}

// Rows of the weight that lie over the map's edge have the gradient 0, which still counts as a step.
template <class T>
void learn_beyond_edges(const LocalLearning<T>& layer, const WindowElements& elements,
                        const T* zeros, int64_t at) {
  int64_t next = 0;
  for (int64_t i = 0; i <= elements.count(); ++i) {
    const int64_t row = i < elements.count() ? elements.rows()[i] : window_rows(layer.windows);
    for (; next < row; ++next) learn_rows(layer, zeros, 0, &next, 1, layer.windows.out, at);
    next = row + 1;
  }
}

template <class T>
int64_t local_learn_scratch(const Windows& windows, int64_t batch, int64_t positions) {
  // indices, a row of zeros, and the signals, behind which a vector may reach
  return index_elements<T>(2 * window_rows(windows)) + padded<T>(windows.out) +
         positions * batch * windows.out + kLanes<T>;
}

template <class T>
void local_learn(const LocalLearning<T>& layer, int64_t begin, int64_t end, T* scratch) {
  const Windows& windows = layer.windows;
  const int64_t out = windows.out, per_group = out / windows.groups;
  alignas(64) T g[kTile * kLanes<T>];
  const Runs samples = {1, layer.batch, 0, windows.in, 0, out};
  WindowElements elements(windows, layer.batch, reinterpret_cast<int64_t*>(scratch));
  T* zeros = scratch + index_elements<T>(2 * window_rows(windows));
  T* run = zeros + padded<T>(out);
  for (int64_t i = 0; i < out; ++i) zeros[i] = T(0);
  read_maps(layer.signal, layer.batch, out, windows.rows * windows.columns, layer.scale, begin, end,
            run);
  for (int64_t p = begin; p < end; ++p) {
    elements.move_to(p);
    const T* signal = run + (p - begin) * layer.batch * out;
    const int64_t position = p * window_rows(windows) * out;
    for (int64_t group = 0; group < windows.groups; ++group) {
      const T* x = layer.x + elements.origin(group);
      for (int64_t c = 0; c < per_group; c += kTileVectors * kLanes<T>) {
        const ColumnTile<T> tile(group * per_group + c, per_group - c);
        for_row_tiles(elements.count(), tile.vectors, [&]<int rows, int vectors>(int64_t i) {
          learning_tile<T, rows, vectors>(x, elements.offsets() + i, signal + tile.column, samples,
                                          false, g, vectors * kLanes<T>);
          learn_rows<T>(layer, g, vectors * kLanes<T>, elements.rows() + i, rows, tile.width,
                        position + tile.column);
        });
      }
    }
    learn_beyond_edges<T>(layer, elements, zeros, position);
    if (layer.to_bias.value) {
      update_bias<T>(signal, out, out, layer.batch, layer.to_bias.at(p * out));
    }
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
