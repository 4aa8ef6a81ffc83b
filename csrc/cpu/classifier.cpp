// The output layer on the CPU (equations: bpfree_kernels/ops/classifier.py).
#include "classifier.h"

#include "dense.h"

namespace bpfree::cpu {
namespace {

template <class Targets>
std::tuple<Tensor, Tensor, Tensor> classify(const Tensor& x, const Tensor& weight,
                                            const MaybeTensor& bias, const Tensor& labels,
                                            const std::string& loss_name, Targets&& targets) {
  const int64_t batch = x.size(0), classes = weight.size(0);
  STD_TORCH_CHECK(classes > 0, "bpfree: weight must hold at least one class");
  const std::vector<int32_t> known = read_labels(labels, classes);
  const Loss kind = parse<Loss>(
      loss_name, {{"ce", Loss::ce}, {"bce", Loss::bce}, {"mse", Loss::mse}}, "loss");
  const double scale = kind == Loss::ce    ? 1.0 / batch
                       : kind == Loss::bce ? 1.0 / (batch * classes)
                                           : 2.0 / (batch * classes);
  const Tensor output = empty_like(x, {batch, classes}), error = empty_like(x, {batch, classes});
  const Tensor loss = empty_like(x, {batch});
  with_dtype(x, [&]<class T>() {
    const Kernels<T>& k = kernels<T>();
    const Scratch<T> signal(batch * classes);
    const auto [to_weight, to_bias] = targets.template operator()<T>();
    dense_forward(x, weight, data<T>(bias), data<T>(output), [&](int64_t begin, int64_t end) {
      k.classify(kind, known.data(), classes, static_cast<T>(scale), data<T>(output),
                 data<T>(error), signal.get(), data<T>(loss), begin, end);
    });
    const Input<T> input = {data<T>(x), nullptr, batch, x.size(1)};
    torch::stable::parallel_for(
        0, blocks(input.in, k.column_block), 4, [&](int64_t begin, int64_t end) {
          const Scratch<T> scratch(k.update_scratch(batch));
          k.update_columns(signal.get(), classes, input, to_weight, begin, end, scratch.get());
        });
    if (to_bias.value) k.update_bias(signal.get(), classes, classes, batch, to_bias);
  });
  return {output, error, loss};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> classifier_step(
    Tensor x, Tensor weight, MaybeTensor bias, Tensor labels, std::string loss,
    std::string optimizer, double lr, double beta1, double beta2, double eps, double weight_decay,
    bool nesterov, MaybeTensor lr_tensor, MaybeTensor weight_m, MaybeTensor weight_v,
    MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v, MaybeTensor bias_step) {
  const RuleArgs rule(optimizer, lr, beta1, beta2, eps, weight_decay, nesterov, lr_tensor);
  return classify(x, weight, bias, labels, loss, [&]<class T>() {
    return rule.layer<T>(weight, bias, weight_m, weight_v, weight_step, bias_m, bias_v, bias_step);
  });
}

std::tuple<Tensor, Tensor, Tensor> classifier_grad(Tensor x, Tensor weight, MaybeTensor bias,
                                                   Tensor labels, std::string loss,
                                                   Tensor grad_weight, MaybeTensor grad_bias,
                                                   bool accumulate) {
  return classify(x, weight, bias, labels, loss, [&]<class T>() {
    return layer_gradients<T>(grad_weight, grad_bias, accumulate);
  });
}

}  // namespace bpfree::cpu
