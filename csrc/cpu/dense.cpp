// A dense layer in two halves, forward and learning, on the CPU (equations: bpfree_kernels/ops/dense.py).
#include "dense.h"

#include "dense_layer.h"

namespace bpfree::cpu {
namespace {

template <class Find>
void learn(const Tensor& post, const Tensor& pre, double scale, Find&& find_targets) {
  with_dtype(pre, [&]<class T>() {
    const Scratch<T> signal(post.numel());
    constexpr int64_t kElementsPerTask = 16384;
    torch::stable::parallel_for(
        0, post.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
          const T* from = data<T>(post);
          for (int64_t i = begin; i < end; ++i) signal.get()[i] = static_cast<T>(scale) * from[i];
        });
    const auto [to_weight, to_bias, to_feedback] = find_targets.template operator()<T>();
    dense_update(signal.get(), post.size(1), pre, {to_weight, to_feedback}, to_bias);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> dense_forward(Tensor x, Tensor weight, MaybeTensor bias,
                                         StringHandle activation, double slope) {
  const Tensor z = new_output(x, {x.size(0), weight.size(0)});
  const Tensor output = new_output(x, {x.size(0), weight.size(0)});
  const Activation kind = parse_activation(take_string(activation));
  with_dtype(x, [&]<class T>() {
    const int64_t out = weight.size(0);
    dense_forward(x, weight, data<T>(bias), data<T>(z), [&](int64_t begin, int64_t end) {
      kernels<T>().activate(kind, static_cast<T>(slope), data<T>(z), data<T>(output), begin * out,
                            end * out);
    });
  });
  return {z, output};
}

void dense_step(
    Tensor post, Tensor pre, Tensor weight, MaybeTensor bias, MaybeTensor feedback, double scale,
    double feedback_scale, StringHandle optimizer, double lr, double beta1, double beta2, double eps,
    double weight_decay, bool nesterov, MaybeTensor lr_tensor, MaybeTensor weight_m,
    MaybeTensor weight_v, MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v,
    MaybeTensor bias_step, MaybeTensor feedback_m, MaybeTensor feedback_v,
    MaybeTensor feedback_step) {
  const RuleArgs rule(take_string(optimizer), lr, beta1, beta2, eps, weight_decay, nesterov, lr_tensor);
  learn(post, pre, scale, [&]<class T>() {
    return std::tuple_cat(
        rule.layer<T>(weight, bias, weight_m, weight_v, weight_step, bias_m, bias_v, bias_step),
        std::tuple(rule.feedback<T>(feedback, feedback_scale, feedback_m, feedback_v, feedback_step)));
  });
}

void dense_grad(Tensor post, Tensor pre, double scale, Tensor grad_weight, MaybeTensor grad_bias,
                bool accumulate) {
  learn(post, pre, scale, [&]<class T>() {
    return std::tuple_cat(layer_gradients<T>(grad_weight, grad_bias, accumulate),
                          std::tuple(Target<T>{}));
  });
}

}  // namespace bpfree::cpu
