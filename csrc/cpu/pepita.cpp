// PEPITA's second pass on the CPU (equations: bpfree_kernels/ops/pepita.py).
//
// A work item owns a few rows of the weight: it computes how their output changes for the whole batch and
// updates those rows while they are still in its core's cache.
#include "pepita.h"

#include "mix.h"

namespace bpfree::cpu {
namespace {

// Runs a layer; `targets` says where its gradients go, as fn<T>() -> {weight target, bias target}.
template <class Targets>
Tensor linear(const Tensor& z, const Tensor& pre, const Tensor& change, const MaybeTensor& feedback,
              const MaybeTensor& mask, const Tensor& weight, const std::string& activation,
              double slope, Targets&& targets) {
  const int64_t batch = pre.size(0), out = weight.size(0);
  const Tensor result = new_output(z, {batch, out});
  const Activation kind = parse_activation(activation);
  with_dtype(pre, [&]<class T>() {
    const Kernels<T>& k = kernels<T>();
    const int64_t classes = feedback ? change.size(1) : 0;
    // W F costs a product with `classes` columns, W (F e) one with `batch`.
    const bool low_rank = feedback && classes < batch;
    Tensor of_input = feedback ? *feedback : change;
    if (feedback && !low_rank) {
      of_input = new_output(pre, {batch, pre.size(1)});
      mix<T>(change, *feedback, pre.size(1), {}, nullptr, data<T>(of_input));
    }
    const Scratch<T> panels(panel_elements<T>(of_input));
    const Scratch<T> error_panels(low_rank ? panel_elements<T>(change) : 0);
    const auto [to_weight, to_bias] = targets.template operator()<T>();
    const PepitaLinear<T> layer = {
        .change = pack_input<T>(of_input, panels),
        .error = low_rank ? pack_input<T>(change, error_panels) : Input<T>{},
        .pre = {data<T>(pre), nullptr, batch, pre.size(1)},
        .weight = data<T>(weight),
        .z = data<T>(z),
        .mask = data<T>(mask),
        .out = out,
        .activation = kind,
        .slope = static_cast<T>(slope),
        .scale = static_cast<T>(-1.0 / batch),
        .difference = data<T>(result),
        .to_weight = to_weight,
        .to_bias = to_bias};
    torch::stable::parallel_for(0, blocks(out, k.row_block), 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(k.pepita_scratch(batch, classes));
      k.pepita_rows(layer, begin, end, scratch.get());
    });
  });
  return result;
}

}  // namespace

Tensor pepita_linear_step(
    Tensor z, Tensor pre, Tensor change, MaybeTensor feedback, MaybeTensor mask, Tensor weight,
    MaybeTensor bias, StringHandle activation, double slope, StringHandle optimizer,
    double lr, double beta1, double beta2, double eps, double weight_decay, bool nesterov,
    MaybeTensor lr_tensor, MaybeTensor weight_m, MaybeTensor weight_v,
    MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v, MaybeTensor bias_step) {
  const RuleArgs rule(take_string(optimizer), lr, beta1, beta2, eps, weight_decay, nesterov, lr_tensor);
  return linear(z, pre, change, feedback, mask, weight, take_string(activation), slope, [&]<class T>() {
    return rule.layer<T>(weight, bias, weight_m, weight_v, weight_step, bias_m, bias_v, bias_step);
  });
}

Tensor pepita_linear_grad(Tensor z, Tensor pre, Tensor change, MaybeTensor feedback,
                          MaybeTensor mask, Tensor weight, StringHandle activation, double slope,
                          Tensor grad_weight, MaybeTensor grad_bias, bool accumulate) {
  return linear(z, pre, change, feedback, mask, weight, take_string(activation), slope, [&]<class T>() {
    return layer_gradients<T>(grad_weight, grad_bias, accumulate);
  });
}

namespace {

void write_difference(const Tensor& z, const Tensor& change, const MaybeTensor& basis,
                      Activation kind, double slope, const Tensor& result) {
  with_dtype(z, [&]<class T>() {
    if (basis) {
      const int64_t size = z.size(0) ? z.numel() / z.size(0) : 0;
      mix<T>(change, *basis, size, {kind, static_cast<T>(slope)}, data<T>(z), data<T>(result));
      return;
    }
    constexpr int64_t kElementsPerTask = 16384;
    torch::stable::parallel_for(0, z.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      kernels<T>().difference(kind, static_cast<T>(slope), data<T>(z), data<T>(change),
                              data<T>(result), begin, end);
    });
  });
}

}  // namespace

Tensor pepita_difference(Tensor z, Tensor change, MaybeTensor basis, StringHandle activation,
                         double slope) {
  const Tensor result = new_output(z);
  write_difference(z, change, basis, parse_activation(take_string(activation)), slope, result);
  return result;
}

void pepita_difference_(Tensor z, Tensor change, MaybeTensor basis, StringHandle activation,
                        double slope) {
  // a task reads a vector of z before it writes the same one
  write_difference(z, change, basis, parse_activation(take_string(activation)), slope, z);
}

Tensor pepita_max_pool(Tensor y, MaybeTensor change, int64_t rows, int64_t columns, int64_t kernel_h,
                       int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_top,
                       int64_t pad_left, int64_t dilation_h, int64_t dilation_w) {
  const Pooling pool = {y.size(1), y.size(2), y.size(3), rows,    columns,    kernel_h,  kernel_w,
                        stride_h,  stride_w,  pad_top,   pad_left, dilation_h, dilation_w};
  const Tensor pooled = new_output(y, {y.size(0), rows, columns, pool.inner});
  with_dtype(y, [&]<class T>() {
    constexpr int64_t kElementsPerTask = 16384;
    const int64_t grain = kElementsPerTask / (columns * pool.inner * kernel_h * kernel_w + 1) + 1;
    torch::stable::parallel_for(0, y.size(0) * rows, grain, [&](int64_t begin, int64_t end) {
      kernels<T>().max_pool(pool, data<T>(y), data<T>(change), data<T>(pooled), begin, end);
    });
  });
  return pooled;
}

}  // namespace bpfree::cpu
