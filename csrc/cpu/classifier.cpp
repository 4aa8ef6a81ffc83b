// The output layer on the CPU (equations: bpfree_kernels/ops/classifier.py).
#include "classifier.h"

#include "dense_layer.h"

namespace bpfree::cpu {
namespace {

// The loss as the ops' schema spells it.
struct LossArgs {
  std::string name;
  double margin, off_class;

  template <class T>
  Objective<T> objective(int64_t batch, int64_t classes) const {
    const Loss loss = parse<Loss>(
        name,
        {{"ce", Loss::ce}, {"bce", Loss::bce}, {"mse", Loss::mse}, {"hinge", Loss::hinge}},
        "loss");
    const double scale = loss == Loss::bce   ? 1.0 / (batch * classes)
                         : loss == Loss::mse ? 2.0 / (batch * classes)
                                             : 1.0 / batch;
    return {loss, static_cast<T>(scale), static_cast<T>(margin), static_cast<T>(off_class)};
  }
};

// What the loss needs of an output layer; `signal` takes the gradient at the logits.
struct Outputs {
  Tensor output, error, loss;
};

template <class T>
Outputs forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                const Tensor& labels, const LossArgs& loss, T* signal) {
  const int64_t batch = x.size(0), classes = weight.size(0);
  STD_TORCH_CHECK(classes > 0, "bpfree: weight must hold at least one class");
  const std::vector<int32_t> known = read_labels(labels, classes);
  const Objective<T> objective = loss.objective<T>(batch, classes);
  const Outputs to = {new_output(x, {batch, classes}), new_output(x, {batch, classes}),
                      new_output(x, {batch})};
  dense_forward(x, weight, data<T>(bias), data<T>(to.output), [&](int64_t begin, int64_t end) {
    kernels<T>().classify(objective, known.data(), classes, data<T>(to.output),
                          data<T>(to.error), signal, data<T>(to.loss), begin, end);
  });
  return to;
}

template <class Targets>
std::tuple<Tensor, Tensor, Tensor> learn(const Tensor& x, const Tensor& weight,
                                         const MaybeTensor& bias, const Tensor& labels,
                                         const LossArgs& loss, Targets&& targets) {
  return with_dtype(x, [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    const Scratch<T> signal(x.size(0) * weight.size(0));
    const auto [to_weight, to_bias] = targets.template operator()<T>();
    const Outputs to = forward<T>(x, weight, bias, labels, loss, signal.get());
    dense_update(signal.get(), weight.size(0), x, {to_weight, {}}, to_bias);
    return {to.output, to.error, to.loss};
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> classifier_forward(Tensor x, Tensor weight, MaybeTensor bias,
                                                      Tensor labels, StringHandle loss,
                                                      double margin, double off_class) {
  const LossArgs args = {take_string(loss), margin, off_class};
  return with_dtype(x, [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    const Outputs to = forward<T>(x, weight, bias, labels, args, nullptr);
    return {to.output, to.error, to.loss};
  });
}

std::tuple<Tensor, Tensor, Tensor> classifier_step(
    Tensor x, Tensor weight, MaybeTensor bias, Tensor labels, StringHandle loss, double margin,
    double off_class, StringHandle optimizer, double lr, double beta1, double beta2, double eps,
    double weight_decay, bool nesterov, MaybeTensor lr_tensor, MaybeTensor weight_m,
    MaybeTensor weight_v, MaybeTensor weight_step, MaybeTensor bias_m, MaybeTensor bias_v,
    MaybeTensor bias_step) {
  const RuleArgs rule(take_string(optimizer), lr, beta1, beta2, eps, weight_decay, nesterov, lr_tensor);
  return learn(x, weight, bias, labels, {take_string(loss), margin, off_class}, [&]<class T>() {
    return rule.layer<T>(weight, bias, weight_m, weight_v, weight_step, bias_m, bias_v, bias_step);
  });
}

std::tuple<Tensor, Tensor, Tensor> classifier_grad(Tensor x, Tensor weight, MaybeTensor bias,
                                                   Tensor labels, StringHandle loss,
                                                   double margin, double off_class,
                                                   Tensor grad_weight, MaybeTensor grad_bias,
                                                   bool accumulate) {
  return learn(x, weight, bias, labels, {take_string(loss), margin, off_class}, [&]<class T>() {
    return layer_gradients<T>(grad_weight, grad_bias, accumulate);
  });
}

}  // namespace bpfree::cpu
