// Maps as tensors: with the channels first or last in memory.
#pragma once

#include "tensors.h"

namespace bpfree::cpu {

template <class T>
Maps<T> maps(const Tensor& tensor) {
  const bool both = tensor.size(1) == 1 || tensor.size(2) * tensor.size(3) == 1;
  return {static_cast<T*>(tensor.data_ptr()), both || channels_last(tensor)};
}

struct Size {
  int64_t height, width;
};

// How the windows of a convolution lie, whose weight is [out, in/groups, kernel_h, kernel_w].
inline Windows conv_windows(const Tensor& weight, Size input, Size output, int64_t stride_h,
                            int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t dilation_h,
                            int64_t dilation_w, int64_t groups) {
  return {.in = weight.size(1) * groups,
          .height = input.height,
          .width = input.width,
          .out = weight.size(0),
          .rows = output.height,
          .columns = output.width,
          .kernel_h = weight.size(2),
          .kernel_w = weight.size(3),
          .stride_h = stride_h,
          .stride_w = stride_w,
          .pad_top = pad_top,
          .pad_left = pad_left,
          .dilation_h = dilation_h,
          .dilation_w = dilation_w,
          .groups = groups};
}

// The rows of a map as work: how many, how many values each has, and by how many rows it may be cut.
struct MapRows {
  int64_t height, elements, step;
};

// Runs f(sample, begin, end, scratch) over the rows of all samples, in blocks that fit a core's cache;
// `scratch_elements` says what a block of so many rows needs.
template <class T, class Size, class F>
void for_rows(const MapRows& map, int64_t batch, Size&& scratch_elements, F&& f) {
  constexpr int64_t kBlockElements = 64 * 1024;
  const int64_t row = map.elements * map.step + 1, count = blocks(map.height, map.step);
  const int64_t tasks = blocks(2 * torch::stable::get_num_threads(), batch < 1 ? 1 : batch);
  int64_t steps = kBlockElements / row;
  if (steps > blocks(count, tasks)) steps = blocks(count, tasks);
  const int64_t rows = (steps < 1 ? 1 : steps) * map.step, each = blocks(map.height, rows);
  torch::stable::parallel_for(0, batch * each, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(scratch_elements(rows));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % each * rows;
      f(task / each, first, first + rows < map.height ? first + rows : map.height, scratch.get());
    }
  });
}

}  // namespace bpfree::cpu
