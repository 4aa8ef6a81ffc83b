// What a locally connected layer's windows hold: where each value lies, and which weights belong to it.
#pragma once

#include "transpose.h"

namespace bpfree::cpu::BPFREE_ISA {

// The part [begin, end) of a kernel's rows (or columns) that lies on the map, for a window that starts at
// `origin`.
struct Span {
  int64_t begin, end;
  bool operator==(const Span&) const = default;
};

inline Span on_map(int64_t origin, int64_t kernel, int64_t dilation, int64_t size) {
  const int64_t begin = origin < 0 ? (-origin + dilation - 1) / dilation : 0;
  const int64_t left = size - origin;
  const int64_t end = left <= 0 ? 0 : (left + dilation - 1) / dilation;
  return {begin < kernel ? begin : kernel, end < kernel ? end : kernel};
}

// The elements of a window that lie on the map, in the order of the weight's rows. The map is
// [pixel][sample][channel].
class WindowElements {
 public:
  // `memory` holds two values for each row of a position's weight.
  WindowElements(const Windows& windows, int64_t batch, int64_t* memory)
      : windows_(windows),
        per_group_(windows.in / windows.groups),
        pixel_step_(batch * windows.in),
        offsets_(memory),
        rows_(memory + windows.kernel_h * windows.kernel_w * (windows.in / windows.groups)) {}

  // Moves to an output position. Windows that reach over the map's edges alike share their elements.
  void move_to(int64_t position) {
    const int64_t top = position / windows_.columns * windows_.stride_h - windows_.pad_top;
    const int64_t left = position % windows_.columns * windows_.stride_w - windows_.pad_left;
    origin_ = (top * windows_.width + left) * pixel_step_;
    const Span down = on_map(top, windows_.kernel_h, windows_.dilation_h, windows_.height);
    const Span across = on_map(left, windows_.kernel_w, windows_.dilation_w, windows_.width);
    if (down == down_ && across == across_) return;
    down_ = down;
    across_ = across;
    count_ = 0;
    for (int64_t i = down.begin; i < down.end; ++i) {
      for (int64_t j = across.begin; j < across.end; ++j) {
        const int64_t pixel = i * windows_.dilation_h * windows_.width + j * windows_.dilation_w;
        const int64_t row = (i * windows_.kernel_w + j) * per_group_;
        for (int64_t c = 0; c < per_group_; ++c, ++count_) {
          offsets_[count_] = pixel * pixel_step_ + c;
          rows_[count_] = row + c;
        }
      }
    }
  }

  int64_t count() const { return count_; }
  // Where the first value of a group's window would lie; offsets() count from there.
  int64_t origin(int64_t group) const { return origin_ + group * per_group_; }
  const int64_t* offsets() const { return offsets_; }
  const int64_t* rows() const { return rows_; }

 private:
  const Windows& windows_;
  int64_t per_group_, pixel_step_;
  int64_t *offsets_, *rows_;
  int64_t origin_ = 0, count_ = 0;
  Span down_ = {-1, -1}, across_ = {-1, -1};
};

// A run of positions of some maps, [position][sample][channel], handed to f(offset, values, lanes) in the
// order of the maps' memory.
template <class T, class F>
void for_maps(const T* run, int64_t batch, int64_t channels, int64_t size, bool channels_last,
              int64_t begin, int64_t end, F&& f) {
  for (int64_t n = 0; n < batch; ++n) {
    const int64_t map = n * channels * size;
    const T* sample = run + n * channels;
    if (channels_last) {
      for (int64_t p = begin; p < end; ++p, sample += batch * channels) {
        for_vectors<T>(channels, [&](int64_t c, int64_t lanes) {
          f(map + p * channels + c, load_lanes(sample + c, lanes), lanes);
        });
      }
    } else {
      for_columns(sample, batch * channels, end - begin, channels,
                  [&](int64_t c, int64_t p, Vec<T> values, int64_t lanes) {
                    f(map + c * size + begin + p, values, lanes);
                  });
    }
  }
}

// The other way round: positions [begin, end) of maps as a run.
template <class T>
void read_maps(const Maps<const T>& maps, int64_t batch, int64_t channels, int64_t size, T scale,
               int64_t begin, int64_t end, T* run) {
  for (int64_t n = 0; n < batch; ++n) {
    const T* map = maps.data + n * channels * size;
    T* sample = run + n * channels;
    if (maps.channels_last) {
      for (int64_t p = begin; p < end; ++p, sample += batch * channels) {
        for_vectors<T>(channels, [&](int64_t c, int64_t lanes) {
          store_lanes<T>(sample + c, scale * load_lanes(map + p * channels + c, lanes), lanes);
        });
      }
    } else {
      for_columns(map + begin, size, channels, end - begin,
                  [&](int64_t p, int64_t c, Vec<T> values, int64_t lanes) {
                    store_lanes<T>(sample + p * batch * channels + c, scale * values, lanes);
                  });
    }
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
