// Rows of one sample's maps as [row][column][channel], where they lie so or copied.
#pragma once

#include "local_windows.h"

namespace bpfree::cpu::BPFREE_ISA {

// Maps of one sample.
template <class T>
Maps<T> sample_of(const Maps<T>& maps, int64_t sample, int64_t channels, int64_t size) {
  return {maps.data + sample * channels * size, maps.channels_last};
}

// Positions [begin, end) of one sample's maps; copied into `room` if the channels do not lie last.
template <class T>
const T* read_run(const Maps<const T>& maps, int64_t sample, int64_t channels, int64_t size,
                  int64_t begin, int64_t end, T* room) {
  const Maps<const T> here = sample_of(maps, sample, channels, size);
  if (here.channels_last) return here.data + begin * channels;
  read_maps(here, 1, channels, size, T(1), begin, end, room);
  return room;
}

// The rectangle of a map that some windows reach, over the map's edges, too; of the channels
// [channel, channel + channels).
struct Band {
  int64_t top, rows, left, columns, channel, channels;

  int64_t elements() const { return rows * columns * channels; }
};

template <class T>
void fill_zero(T* to, int64_t count) {
  if (count > 0) std::memset(to, 0, static_cast<size_t>(count) * sizeof(T));
}

// A band of one sample's maps, [row][column][channel], zero outside the map.
template <class T>
void copy_band(const Maps<const T>& maps, int64_t sample, int64_t channels, int64_t height,
               int64_t width, const Band& band, T* to) {
  const Maps<const T> here = sample_of(maps, sample, channels, height * width);
  const int64_t reach = band.left + band.columns, count = band.channels;
  int64_t first = band.left < 0 ? -band.left : 0;
  if (first > band.columns) first = band.columns;
  int64_t last = (reach < width ? reach : width) - band.left;
  if (last < first) last = first;
  for (int64_t r = 0; r < band.rows; ++r, to += band.columns * count) {
    const int64_t row = band.top + r;
    if (row < 0 || row >= height || last == first) {
      fill_zero(to, band.columns * count);
      continue;
    }
    fill_zero(to, first * count);
    const int64_t start = row * width + band.left + first;
    T* inside = to + first * count;
    if (!here.channels_last) {
      for_columns(here.data + band.channel * height * width + start, height * width, count,
                  last - first, [&](int64_t column, int64_t c, Vec<T> values, int64_t lanes) {
                    store_lanes(inside + column * count + c, values, lanes);
                  });
    } else if (count == channels) {
      std::memcpy(inside, here.data + start * channels,
                  static_cast<size_t>((last - first) * count) * sizeof(T));
    } else {
      const T* from = here.data + start * channels + band.channel;
      for (int64_t column = 0; column < last - first; ++column) {
        for_vectors<T>(count, [&](int64_t c, int64_t lanes) {
          store_lanes(inside + column * count + c, load_lanes(from + column * channels + c, lanes),
                      lanes);
        });
      }
    }
    fill_zero(to + last * count, (band.columns - last) * count);
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
