// The products of a convolution: the gradient of its weight, and what a signal at its output is at its input.
// No window is copied: a product reads a band of rows, padded once, one value at a time.
#pragma once

#include "bands.h"
#include "tiles.h"

namespace bpfree::cpu::BPFREE_ISA {

// The part of a sample that a product works on, in the second-level cache.
inline constexpr int64_t kBandBytes = 256 * 1024;
// Signals that meet all rows of a gradient's block while they sit in the first-level cache.
inline constexpr int64_t kSignalBytes = 24 * 1024;

inline int64_t kernel_elements(const Windows& windows) {
  return windows.kernel_h * windows.kernel_w;
}

// The band of x under the windows of output rows [begin, end).
inline Band band_of_windows(const Windows& windows, int64_t begin, int64_t end, int64_t channel,
                            int64_t channels) {
  return {.top = begin * windows.stride_h - windows.pad_top,
          .rows = (end - begin - 1) * windows.stride_h + windows.dilation_h * (windows.kernel_h - 1) + 1,
          .left = -windows.pad_left,
          .columns = (windows.columns - 1) * windows.stride_w +
                     windows.dilation_w * (windows.kernel_w - 1) + 1,
          .channel = channel,
          .channels = channels};
}

// Output rows whose windows' band stays small.
template <class T>
int64_t band_rows(const Windows& windows, int64_t channels) {
  const int64_t row = band_of_windows(windows, 0, 1, 0, channels).columns * channels;
  const int64_t rows = kBandBytes / static_cast<int64_t>(sizeof(T)) / (row * windows.stride_h + 1);
  return rows < 1 ? 1 : rows < windows.rows ? rows : windows.rows;
}

// Channels of x that `rows` rows of a group's gradient [in/groups][kernel] may touch.
inline int64_t channels_of_rows(const Windows& windows, int64_t rows) {
  const int64_t channels = rows / kernel_elements(windows) + 2, all = windows.in / windows.groups;
  return channels < all ? channels : all;
}

template <class T>
int64_t conv_learn_scratch(const Windows& windows, int64_t rows) {
  const int64_t channels = channels_of_rows(windows, rows), band = band_rows<T>(windows, channels);
  return index_elements<T>(rows) + padded<T>(band_of_windows(windows, 0, band, 0, channels).elements()) +
         band * windows.columns * windows.out + kLanes<T>;
}

// Elements of the gradients of all groups, with rows of whole vectors.
template <class T>
int64_t conv_part(const Windows& windows) {
  return windows.in * kernel_elements(windows) * padded<T>(windows.out / windows.groups);
}

// Adds what one band of signals, [position][signal_step], gives to the gradient rows at `offsets`.
template <class T>
void learn_band(const Windows& windows, const T* x, const Band& band, const int64_t* offsets,
                int64_t rows, const T* signal, int64_t signal_step, int64_t positions_down, T* g) {
  const int64_t per_group = windows.out / windows.groups, stride = padded<T>(per_group);
  const int64_t x_step = windows.stride_w * band.channels;
  const int64_t x_run = windows.stride_h * band.columns * band.channels;
  for (int64_t c = 0; c < per_group; c += kTileVectors * kLanes<T>) {
    const ColumnTile<T> tile(c, per_group - c);
    const int64_t row = windows.columns * tile.vectors * kVectorBytes;
    const int64_t fit = kSignalBytes / (row + 1) + 1;
    for (int64_t y = 0; y < positions_down; y += fit) {
      const int64_t here = positions_down - y < fit ? positions_down - y : fit;
      const Runs over = {here,  windows.columns, x_run, x_step, windows.columns * signal_step,
                         signal_step};
      for_row_tiles(rows, tile.vectors, [&]<int tile_rows, int vectors>(int64_t r) {
        learning_tile<T, tile_rows, vectors>(
            x + y * x_run, offsets + r, signal + y * windows.columns * signal_step + c, over, true,
            g + r * stride + c, stride);
      });
    }
  }
}

// The gradient of rows [begin, end) of a group's weight, [in/groups][kernel][out/groups], summed over some
// samples, into g with rows of whole vectors; and of the group's bias, if wanted.
template <class T>
void conv_learn(const ConvLearning<T>& layer, int64_t sample_begin, int64_t sample_end, int64_t group,
                int64_t begin, int64_t end, T* g, T* bias, T* scratch) {
  const Windows& windows = layer.windows;
  const int64_t elements = kernel_elements(windows), in = windows.in / windows.groups;
  const int64_t out = windows.out / windows.groups, size = windows.rows * windows.columns;
  const int64_t channel = begin / elements;
  const int64_t channels = begin < end ? (end - 1) / elements + 1 - channel : 0;
  const int64_t band_size = band_rows<T>(windows, channels_of_rows(windows, end - begin));
  int64_t* offsets = reinterpret_cast<int64_t*>(scratch);
  T* x = scratch + index_elements<T>(end - begin);
  const Band whole = band_of_windows(windows, 0, band_size, group * in + channel, channels);
  T* room = x + padded<T>(whole.elements());
  for (int64_t r = begin; r < end; ++r) {
    const int64_t i = r % elements / windows.kernel_w, j = r % elements % windows.kernel_w;
    offsets[r - begin] =
        (i * windows.dilation_h * whole.columns + j * windows.dilation_w) * channels +
        r / elements - channel;
  }
  fill_zero(g, (end - begin) * padded<T>(out));
  if (bias) fill_zero(bias, out);
  // a tile reads whole vectors of signals; the last ones may lie behind the maps
  const bool in_place = layer.signal.channels_last && out % kLanes<T> == 0;
  for (int64_t n = sample_begin; n < sample_end; ++n) {
    const Maps<const T> signal = sample_of(layer.signal, n, windows.out, size);
    for (int64_t y = 0; y < windows.rows; y += band_size) {
      const int64_t last = windows.rows - y < band_size ? windows.rows : y + band_size;
      const Band band = band_of_windows(windows, y, last, group * in + channel, channels);
      copy_band(layer.x, n, windows.in, windows.height, windows.width, band, x);
      const T* from = signal.data + y * windows.columns * windows.out;
      if (!in_place) {
        read_maps(signal, 1, windows.out, size, T(1), y * windows.columns, last * windows.columns,
                  room);
        from = room;
      }
      from += group * out;
      learn_band(windows, x, band, offsets, end - begin, from, windows.out, last - y, g);
      if (!bias) continue;
      for_vectors<T>(out, [&](int64_t c, int64_t lanes) {
        Vec<T> total = {};
        for (int64_t p = 0; p < (last - y) * windows.columns; ++p) {
          total += load_lanes(from + p * windows.out + c, lanes);
        }
        store_lanes(bias + c, load_lanes(bias + c, lanes) + total, lanes);
      });
    }
  }
}

// Sums partial gradients, [part][group][in/groups * kernel][whole vectors of out/groups], and sends outputs
// [begin, end) of a group to the weight's targets; a part is `part_size` elements apart from the next.
template <class T>
void conv_apply(const Windows& windows, const T* parts, int64_t count, int64_t part_size,
                int64_t group, int64_t begin, int64_t end, const Targets<T>& to, T* scratch) {
  const int64_t rows = kernel_elements(windows) * (windows.in / windows.groups);
  const int64_t out = windows.out / windows.groups, stride = padded<T>(out);
  T* sums = scratch;
  T* by_output = scratch + rows * kLanes<T>;
  for (int64_t o = begin; o < end; o += kLanes<T>) {
    const int64_t width = end - o < kLanes<T> ? end - o : kLanes<T>;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = parts + (group * rows + r) * stride + o;
      Vec<T> total = {};
      for (int64_t part = 0; part < count; ++part) total += load(from + part * part_size);
      store<T>(sums + r * kLanes<T>, total);
    }
    for_columns(sums, kLanes<T>, rows, width,
                [&](int64_t column, int64_t r, Vec<T> values, int64_t lanes) {
                  store_lanes(by_output + column * rows + r, values, lanes);
                });
    apply_tile(by_output, rows, width, rows, to.at((group * out + o) * rows), rows);
  }
}

template <class T>
int64_t conv_apply_scratch(const Windows& windows) {
  return 2 * kLanes<T> * kernel_elements(windows) * (windows.in / windows.groups);
}

// A weight [out][in/groups][kernel] as [kernel][out][whole vectors of in/groups], for outputs [begin, end).
template <class T>
void pack_kernel(const Windows& windows, const T* weight, int64_t begin, int64_t end, T* packed) {
  const int64_t elements = kernel_elements(windows), in = windows.in / windows.groups;
  for (int64_t o = begin; o < end; ++o) {
    for_columns(weight + o * in * elements, elements, in, elements,
                [&](int64_t element, int64_t i, Vec<T> values, int64_t) {
                  store(packed + (element * windows.out + o) * padded<T>(in) + i, values);
                });
  }
}

template <class T>
int64_t packed_elements(const Windows& windows) {
  return kernel_elements(windows) * windows.out * padded<T>(windows.in / windows.groups);
}

// An element of the kernel, as some pixels meet it: where its signals begin, and its weights.
struct Tap {
  int64_t signal, weight;
};

// The sum over taps and output channels for some pixels, `to_step` apart, x vectors of input channels.
template <class T, int rows, int vectors>
inline void tap_tile(const T* signal, int64_t signal_step, const Tap* taps, int64_t count,
                     int64_t depth, const T* weight, int64_t weight_stride, FirstLanes<T> last, T* to,
                     int64_t to_step) {
  Vec<T> acc[rows][vectors] = {};
  for (int64_t tap = 0; tap < count; ++tap) {
    const T* at = signal + taps[tap].signal;
    const T* w = weight + taps[tap].weight;
    for (int64_t k = 0; k < depth; ++k, w += weight_stride) {
      Vec<T> ws[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) ws[v] = load(w + v * kLanes<T>);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Vec<T> value = splat(at[r * signal_step + k]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) acc[r][v] += value * ws[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      T* at = to + r * to_step + v * kLanes<T>;
      if (v == vectors - 1) {
        store(at, acc[r][v], last);
      } else {
        store(at, acc[r][v]);
      }
    }
  }
}

inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// The band of a signal that meets input rows [begin, end).
inline Band band_of_signal(const Windows& windows, int64_t begin, int64_t end) {
  const int64_t top = floor_div(
      begin + windows.pad_top - (windows.kernel_h - 1) * windows.dilation_h, windows.stride_h);
  const int64_t left = floor_div(
      windows.pad_left - (windows.kernel_w - 1) * windows.dilation_w, windows.stride_w);
  return {.top = top,
          .rows = floor_div(end - 1 + windows.pad_top, windows.stride_h) + 1 - top,
          .left = left,
          .columns = floor_div(windows.width - 1 + windows.pad_left, windows.stride_w) + 1 - left,
          .channel = 0,
          .channels = windows.out};
}

// The taps that meet pixels of one row and of every stride_w-th column from `column` on.
inline int64_t find_taps(const Windows& windows, const Band& band, int64_t row, int64_t column,
                         int64_t element_size, Tap* taps) {
  int64_t count = 0;
  for (int64_t i = 0; i < windows.kernel_h; ++i) {
    const int64_t down = row + windows.pad_top - i * windows.dilation_h;
    if (down % windows.stride_h) continue;
    for (int64_t j = 0; j < windows.kernel_w; ++j) {
      const int64_t across = column + windows.pad_left - j * windows.dilation_w;
      if (across % windows.stride_w) continue;
      const int64_t position = (down / windows.stride_h - band.top) * band.columns +
                               across / windows.stride_w - band.left;
      taps[count++] = {position * band.channels, (i * windows.kernel_w + j) * element_size};
    }
  }
  return count;
}

// Input rows [begin, end) of one sample, [row][column][in], of the transposed convolution of a band of signals
// with a packed weight; `taps` has room for all of the kernel.
template <class T>
void deconvolve_band(const Windows& windows, const T* signals, const Band& band, const T* packed,
                     int64_t begin, int64_t end, T* to, Tap* taps) {
  const int64_t in = windows.in / windows.groups, out = windows.out / windows.groups;
  const int64_t stride = padded<T>(in);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t column = 0; column < windows.stride_w && column < windows.width; ++column) {
      const int64_t count = find_taps(windows, band, row, column, windows.out * stride, taps);
      const int64_t pixels = (windows.width - column + windows.stride_w - 1) / windows.stride_w;
      T* first = to + ((row - begin) * windows.width + column) * windows.in;
      for (int64_t group = 0; group < windows.groups; ++group) {
        for (int64_t c = 0; c < in; c += kTileVectors * kLanes<T>) {
          const ColumnTile<T> tile(c, in - c);
          for_row_tiles(pixels, tile.vectors, [&]<int rows, int vectors>(int64_t p) {
            tap_tile<T, rows, vectors>(signals + p * windows.out + group * out, windows.out, taps,
                                       count, out, packed + group * out * stride + c, stride,
                                       tile.last, first + p * windows.stride_w * windows.in +
                                       group * in + c, windows.stride_w * windows.in);
          });
        }
      }
    }
  }
}

// The elements of a band of signals that meets so many input rows.
inline int64_t signal_band_elements(const Windows& windows, int64_t rows) {
  // the number of the band's rows depends on where it begins by one at most
  const Band band = band_of_signal(windows, 0, rows);
  return (band.rows + 1) * band.columns * band.channels;
}

template <class T>
int64_t deconvolve_scratch(const Windows& windows, int64_t rows) {
  return index_elements<T>(2 * kernel_elements(windows)) +
         padded<T>(signal_band_elements(windows, rows));
}

// The same from a signal as maps.
template <class T>
void deconvolve(const Windows& windows, const Maps<const T>& signal, int64_t sample, const T* packed,
                int64_t begin, int64_t end, T* to, T* scratch) {
  if (begin == end) return;
  Tap* taps = reinterpret_cast<Tap*>(scratch);
  T* signals = scratch + index_elements<T>(2 * kernel_elements(windows));
  const Band band = band_of_signal(windows, begin, end);
  copy_band(signal, sample, windows.out, windows.rows, windows.columns, band, signals);
  deconvolve_band(windows, signals, band, packed, begin, end, to, taps);
}

}  // namespace bpfree::cpu::BPFREE_ISA
