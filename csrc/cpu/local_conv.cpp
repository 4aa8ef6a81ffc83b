// Locally connected layers on the CPU (equations: bpfree_kernels/ops/local_conv.py).
//
// A work item owns a run of positions, so that each weight is read once and nothing is written by two.
// Between maps and products values travel as [position][sample][channel]: with the channels first in
// memory, a run of positions is a vector of the map.
#include "local_conv.h"

#include "maps.h"

namespace bpfree::cpu {
namespace {

Windows make_windows(const Tensor& weight, Size input, int64_t stride_h, int64_t stride_w,
                     int64_t pad_top, int64_t pad_left, int64_t dilation_h, int64_t dilation_w,
                     int64_t groups) {
  return {.in = weight.size(4) * groups,
          .height = input.height,
          .width = input.width,
          .out = weight.size(5),
          .rows = weight.size(0),
          .columns = weight.size(1),
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

// Maps as [position][sample][channel]: samples side by side, whatever the size of a map.
template <class T>
Scratch<T> by_position(const Tensor& tensor) {
  const Maps<const T> from = maps<const T>(tensor);
  const int64_t batch = tensor.size(0), channels = tensor.size(1);
  const int64_t size = tensor.size(2) * tensor.size(3);
  Scratch<T> result(tensor.numel());
  constexpr int64_t kRun = 64 / sizeof(T);
  torch::stable::parallel_for(0, blocks(size, kRun), 1, [&](int64_t begin, int64_t end) {
    const int64_t last = end * kRun < size ? end * kRun : size;
    kernels<T>().read_maps(from, batch, channels, size, T(1), begin * kRun, last,
                           result.get() + begin * kRun * batch * channels);
  });
  return result;
}

// Runs f(begin, end, scratch) over `count` positions, in runs of whole vectors where there are enough.
template <class T, class F>
void for_runs(int64_t count, int64_t (*scratch_elements)(const Windows&, int64_t, int64_t),
              const Windows& windows, int64_t batch, F&& f) {
  constexpr int64_t kRun = 64 / sizeof(T);
  const int64_t shared = count / (2 * torch::stable::get_num_threads());
  const int64_t run = shared < 1 ? 1 : shared < kRun ? shared : kRun;
  torch::stable::parallel_for(0, blocks(count, run), 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> scratch(scratch_elements(windows, batch, run));
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = (block + 1) * run < count ? (block + 1) * run : count;
      f(block * run, last, scratch.get());
    }
  });
}

template <class T>
void learn(const LocalLearning<T>& layer) {
  const Kernels<T>& k = kernels<T>();
  for_runs<T>(layer.windows.rows * layer.windows.columns, k.local_learn_scratch, layer.windows,
              layer.batch, [&](int64_t begin, int64_t end, T* scratch) {
                k.local_learn(layer, begin, end, scratch);
              });
}

const uint8_t* mask_bytes(const MaybeTensor& mask) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->is_contiguous(), "bpfree: a mask is not contiguous");
  return static_cast<const uint8_t*>(mask->data_ptr());
}

}  // namespace

std::tuple<Tensor, Tensor> local_conv_forward(Tensor x, Tensor weight, MaybeTensor bias,
                                              StringHandle activation, double slope,
                                              int64_t stride_h, int64_t stride_w, int64_t pad_top,
                                              int64_t pad_left, int64_t dilation_h,
                                              int64_t dilation_w, int64_t groups) {
  const Windows windows = make_windows(weight, {x.size(2), x.size(3)}, stride_h, stride_w, pad_top,
                                       pad_left, dilation_h, dilation_w, groups);
  const Activation kind = parse_activation(take_string(activation));
  const Tensor z = new_maps(x, windows.out, windows.rows, windows.columns);
  const bool activates = kind != Activation::identity;
  const Tensor y = activates ? new_maps(x, windows.out, windows.rows, windows.columns)
                             : new_output(x, {0});
  with_dtype(x, [&]<class T>() {
    const Kernels<T>& k = kernels<T>();
    const Scratch<T> inputs = by_position<T>(x);
    const LocalForward<T> layer = {.windows = windows,
                                   .batch = x.size(0),
                                   .x = inputs.get(),
                                   .weight = data<T>(weight),
                                   .bias = data<T>(bias),
                                   .activation = kind,
                                   .slope = static_cast<T>(slope),
                                   .z = {static_cast<T*>(z.data_ptr()), channels_last(x)},
                                   .y = activates ? static_cast<T*>(y.data_ptr()) : nullptr};
    for_runs<T>(windows.rows * windows.columns, k.local_forward_scratch, windows, layer.batch,
                [&](int64_t begin, int64_t end, T* scratch) {
                  k.local_forward(layer, begin, end, scratch);
                });
  });
  return {z, y};
}

Tensor local_conv_feedback(Tensor signal, Tensor weight, MaybeTensor gate, StringHandle activation,
                           double slope, int64_t height, int64_t width, int64_t stride_h,
                           int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t dilation_h,
                           int64_t dilation_w, int64_t groups) {
  const Windows windows = make_windows(weight, {height, width}, stride_h, stride_w, pad_top,
                                       pad_left, dilation_h, dilation_w, groups);
  const Activation kind = parse_activation(take_string(activation));
  const Tensor change = new_maps(signal, windows.in, height, width);
  const bool last = channels_last(signal);
  with_dtype(signal, [&]<class T>() {
    const Kernels<T>& k = kernels<T>();
    const int64_t batch = signal.size(0);
    const Scratch<T> signals = by_position<T>(signal);
    const LocalFeedback<T> layer = {
        .windows = windows,
        .batch = batch,
        .signal = signals.get(),
        .weight = data<T>(weight),
        .gate = gate ? static_cast<const T*>(gate->data_ptr()) : nullptr,
        .activation = kind,
        .slope = static_cast<T>(slope),
        .change = {static_cast<T*>(change.data_ptr()), last}};
    for_runs<T>(height * width, k.local_feedback_scratch, windows, batch,
                [&](int64_t begin, int64_t end, T* scratch) {
                  k.local_feedback(layer, begin, end, scratch);
                });
  });
  return change;
}

void local_conv_grad(Tensor signal, Tensor x, MaybeTensor mask, double scale, int64_t stride_h,
                     int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t dilation_h,
                     int64_t dilation_w, int64_t groups, Tensor grad_weight, MaybeTensor grad_bias,
                     bool accumulate) {
  const Windows windows = make_windows(grad_weight, {x.size(2), x.size(3)}, stride_h, stride_w,
                                       pad_top, pad_left, dilation_h, dilation_w, groups);
  with_dtype(x, [&]<class T>() {
    auto [to_weight, to_bias] = layer_gradients<T>(grad_weight, grad_bias, accumulate);
    to_weight.mask = mask_bytes(mask);
    const Scratch<T> inputs = by_position<T>(x);
    learn<T>({windows, x.size(0), maps<const T>(signal), inputs.get(), static_cast<T>(scale),
              to_weight, to_bias, {}});
  });
}

void local_conv_step(Tensor signal, Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor feedback,
                     MaybeTensor weight_mask, MaybeTensor feedback_mask, double scale,
                     int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_left,
                     int64_t dilation_h, int64_t dilation_w, int64_t groups, StringHandle optimizer,
                     double lr, double beta1, double beta2, double eps, double weight_decay,
                     bool nesterov, MaybeTensor lr_tensor, MaybeTensor weight_m, MaybeTensor weight_v,
                     MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v,
                     MaybeTensor bias_step, MaybeTensor feedback_m, MaybeTensor feedback_v,
                     MaybeTensor feedback_step) {
  const Windows windows = make_windows(weight, {x.size(2), x.size(3)}, stride_h, stride_w, pad_top,
                                       pad_left, dilation_h, dilation_w, groups);
  const RuleArgs rule(take_string(optimizer), lr, beta1, beta2, eps, weight_decay, nesterov, lr_tensor);
  with_dtype(x, [&]<class T>() {
    auto [to_weight, to_bias] = rule.layer<T>(weight, bias, weight_m, weight_v, weight_step, bias_m,
                                              bias_v, bias_step);
    to_weight.mask = mask_bytes(weight_mask);
    Target<T> to_feedback =
        rule.feedback<T>(feedback, 1.0, feedback_m, feedback_v, feedback_step);
    to_feedback.mask = mask_bytes(feedback_mask);
    const Scratch<T> inputs = by_position<T>(x);
    learn<T>({windows, x.size(0), maps<const T>(signal), inputs.get(), static_cast<T>(scale),
              to_weight, to_bias, to_feedback});
  });
}

}  // namespace bpfree::cpu
