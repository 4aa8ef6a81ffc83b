// DRTP on the CPU (equations: bpfree_kernels/ops/drtp.py).
//
// A work item owns a few rows of the weight: it computes their output for the whole batch, turns it into
// the signal, and updates those rows while they are still in its core's cache.
#include "drtp.h"

namespace bpfree::cpu {
namespace {

// Runs a dense layer; `targets` says where its gradients go, as fn<T>() -> {weight target, bias target}.
template <class Targets>
Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
              const Tensor& feedback, const Tensor& labels, const std::string& activation,
              double slope, Targets&& targets) {
  const std::vector<int32_t> classes = read_labels(labels, feedback.size(0));
  const Tensor output = new_output(x, {x.size(0), weight.size(0)});
  with_dtype(x, [&]<class T>() {
    const Kernels<T>& k = kernels<T>();
    const Scratch<T> panels(panel_elements<T>(x));
    const auto [to_weight, to_bias] = targets.template operator()<T>();
    const DrtpLinear<T> layer = {
        pack_input<T>(x, panels),     data<T>(weight), data<T>(bias), data<T>(feedback),
        classes.data(),               weight.size(0),  parse_activation(activation),
        static_cast<T>(slope),        data<T>(output), to_weight,     to_bias};
    torch::stable::parallel_for(
        0, blocks(layer.out, k.row_block), 1, [&](int64_t begin, int64_t end) {
          const Scratch<T> scratch(k.drtp_scratch(layer.x.batch));
          k.drtp_rows(layer, begin, end, scratch.get());
        });
  });
  return output;
}

}  // namespace

Tensor drtp_linear_step(Tensor x, Tensor weight, MaybeTensor bias, Tensor feedback, Tensor labels,
                        StringHandle activation, double slope, StringHandle optimizer, double lr,
                        double beta1, double beta2, double eps, double weight_decay, bool nesterov,
                        MaybeTensor lr_tensor, MaybeTensor weight_m, MaybeTensor weight_v,
                        MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v,
                        MaybeTensor bias_step) {
  const RuleArgs rule(take_string(optimizer), lr, beta1, beta2, eps, weight_decay, nesterov, lr_tensor);
  return linear(x, weight, bias, feedback, labels, take_string(activation), slope, [&]<class T>() {
    return rule.layer<T>(weight, bias, weight_m, weight_v, weight_step, bias_m, bias_v, bias_step);
  });
}

Tensor drtp_linear_grad(Tensor x, Tensor weight, MaybeTensor bias, Tensor feedback, Tensor labels,
                        StringHandle activation, double slope, Tensor grad_weight,
                        MaybeTensor grad_bias, bool accumulate) {
  return linear(x, weight, bias, feedback, labels, take_string(activation), slope, [&]<class T>() {
    return layer_gradients<T>(grad_weight, grad_bias, accumulate);
  });
}

std::tuple<Tensor, Tensor> drtp_signal(Tensor z, Tensor feedback, Tensor labels,
                                       StringHandle activation, double slope) {
  const std::vector<int32_t> classes = read_labels(labels, feedback.size(0));
  const Tensor y = new_output(z), signal = new_output(z);
  with_dtype(z, [&]<class T>() {
    const int64_t batch = z.size(0), size = batch ? z.numel() / batch : 0;
    constexpr int64_t kElementsPerTask = 16384;
    const int64_t samples = size ? kElementsPerTask / size + 1 : 1;
    const Activation kind = parse_activation(take_string(activation));
    torch::stable::parallel_for(0, batch, samples, [&](int64_t begin, int64_t end) {
      kernels<T>().signal(kind, static_cast<T>(slope), data<T>(z), data<T>(feedback),
                          classes.data(), size, data<T>(y), data<T>(signal), begin, end);
    });
  });
  return {y, signal};
}

}  // namespace bpfree::cpu
