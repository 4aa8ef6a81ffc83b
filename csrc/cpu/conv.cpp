// What a convolution learns, on the CPU (equations: bpfree_kernels/ops/conv.py).
//
// A work item sums the gradient of a block of the weight's rows over a part of the samples, in its core's cache.
// The parts depend on the sizes alone, and are added in order: threads change no digit.
#include "conv.h"

#include "maps.h"

namespace bpfree::cpu {
namespace {

// How the gradient is cut into work items.
struct Parts {
  int64_t row_block, blocks, samples;
};

template <class T>
Parts cut(const Windows& windows, int64_t batch, int64_t rows) {
  constexpr int64_t kBlockBytes = 192 * 1024, kItems = 16, kMemory = int64_t(32) << 20;
  const int64_t bytes = kernels<T>().conv_part(windows) * sizeof(T) / windows.groups;  // of a group
  const int64_t count = blocks(bytes, kBlockBytes) < 1 ? 1 : blocks(bytes, kBlockBytes);
  const int64_t row_block = blocks(rows, count) < 1 ? 1 : blocks(rows, count);
  const int64_t in_memory = kMemory / (windows.groups * bytes + 1);
  int64_t samples = blocks(kItems, windows.groups * count);
  if (samples > in_memory) samples = in_memory;
  if (samples > batch) samples = batch;
  return {row_block, blocks(rows, row_block) < 1 ? 1 : blocks(rows, row_block), samples < 1 ? 1 : samples};
}

template <class T>
void learn(const ConvLearning<T>& layer, int64_t batch, const Targets<T>& to_weight,
           const Target<T>& to_bias) {
  const Kernels<T>& k = kernels<T>();
  const Windows& windows = layer.windows;
  const int64_t rows = windows.in / windows.groups * windows.kernel_h * windows.kernel_w;
  const int64_t out = windows.out / windows.groups, part_size = k.conv_part(windows);
  const int64_t row_size = rows ? part_size / windows.groups / rows : 0;
  const Parts parts = cut<T>(windows, batch, rows);
  const Scratch<T> g(parts.samples * part_size), bias(parts.samples * windows.out);
  const int64_t per_part = windows.groups * parts.blocks;
  torch::stable::parallel_for(0, parts.samples * per_part, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(k.conv_learn_scratch(windows, parts.row_block));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / per_part, group = item % per_part / parts.blocks;
      const int64_t first = item % parts.blocks * parts.row_block;
      const int64_t last = first + parts.row_block < rows ? first + parts.row_block : rows;
      T* to = g.get() + part * part_size + (group * rows + first) * row_size;
      T* sum = to_bias.value && first == 0 ? bias.get() + part * windows.out + group * out : nullptr;
      k.conv_learn(layer, part * batch / parts.samples, (part + 1) * batch / parts.samples, group, first,
                   last, to, sum, scratch.get());
    }
  });
  constexpr int64_t kOutputs = 16;
  const int64_t tasks = blocks(out, kOutputs);
  torch::stable::parallel_for(0, windows.groups * tasks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(k.conv_apply_scratch(windows));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tasks * kOutputs;
      k.conv_apply(windows, g.get(), parts.samples, part_size, task / tasks, first,
                   first + kOutputs < out ? first + kOutputs : out, to_weight, scratch.get());
    }
  });
  if (to_bias.value) k.update_bias(bias.get(), windows.out, windows.out, parts.samples, to_bias);
}

}  // namespace

void conv_step(Tensor signal, Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor feedback, double scale,
               double feedback_scale, int64_t stride_h, int64_t stride_w, int64_t pad_top,
               int64_t pad_left, int64_t dilation_h, int64_t dilation_w, int64_t groups,
               StringHandle optimizer, double lr, double beta1, double beta2, double eps,
               double weight_decay, bool nesterov, MaybeTensor lr_tensor, MaybeTensor weight_m,
               MaybeTensor weight_v, MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v,
               MaybeTensor bias_step, MaybeTensor feedback_m, MaybeTensor feedback_v,
               MaybeTensor feedback_step) {
  const Windows windows =
      conv_windows(weight, {x.size(2), x.size(3)}, {signal.size(2), signal.size(3)}, stride_h, stride_w,
                   pad_top, pad_left, dilation_h, dilation_w, groups);
  const RuleArgs rule(take_string(optimizer), lr, beta1, beta2, eps, weight_decay, nesterov, lr_tensor);
  with_dtype(x, [&]<class T>() {
    auto [to_weight, to_bias] = rule.layer<T>(weight, bias, weight_m, weight_v, weight_step, bias_m,
                                              bias_v, bias_step);
    to_weight.rule.gain = to_bias.rule.gain = static_cast<T>(scale);
    const Target<T> to_feedback =
        rule.feedback<T>(feedback, scale * feedback_scale, feedback_m, feedback_v, feedback_step);
    learn<T>({windows, maps<const T>(signal), maps<const T>(x)}, x.size(0), {to_weight, to_feedback},
             to_bias);
  });
}

void conv_grad(Tensor signal, Tensor x, double scale, int64_t stride_h, int64_t stride_w, int64_t pad_top,
               int64_t pad_left, int64_t dilation_h, int64_t dilation_w, int64_t groups,
               Tensor grad_weight, MaybeTensor grad_bias, bool accumulate) {
  const Windows windows =
      conv_windows(grad_weight, {x.size(2), x.size(3)}, {signal.size(2), signal.size(3)}, stride_h,
                   stride_w, pad_top, pad_left, dilation_h, dilation_w, groups);
  with_dtype(x, [&]<class T>() {
    auto [to_weight, to_bias] = layer_gradients<T>(grad_weight, grad_bias, accumulate);
    to_weight.rule.gain = to_bias.rule.gain = static_cast<T>(scale);
    learn<T>({windows, maps<const T>(signal), maps<const T>(x)}, x.size(0), {to_weight, {}}, to_bias);
  });
}

}  // namespace bpfree::cpu
