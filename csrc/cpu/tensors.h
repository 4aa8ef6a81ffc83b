// From torch's tensors to the plain structs of the kernels.
#pragma once

#include "../tensors.h"

#include <cmath>
#include <memory>

#include "dispatch.h"

namespace bpfree::cpu {

// Uninitialised memory for kernels: cache-line aligned, freed at the end of the scope.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(static_cast<T*>(::operator new(count * sizeof(T), kAlignment))) {}
  T* get() const { return memory_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<T, Free> memory_;
};

// Labels as int32, -1 for those outside [0, classes): kernels never form an address from another.
inline std::vector<int32_t> read_labels(const Tensor& labels, int64_t classes) {
  std::vector<int32_t> result(labels.numel());
  const auto copy = [&](const auto* from) {
    for (size_t n = 0; n < result.size(); ++n) {
      result[n] = from[n] >= 0 && from[n] < classes ? static_cast<int32_t>(from[n]) : -1;
    }
  };
  if (labels.scalar_type() == torch::headeronly::ScalarType::Long) {
    copy(data<int64_t>(labels));
  } else {
    STD_TORCH_CHECK(labels.scalar_type() == torch::headeronly::ScalarType::Int,
                    "bpfree: labels must be int32 or int64");
    copy(data<int32_t>(labels));
  }
  return result;
}

// An update rule as the ops' schema spells it, without the state that belongs to one parameter.
struct RuleArgs {
  std::string optimizer;
  double lr, beta1, beta2, eps, weight_decay;
  bool nesterov;

  RuleArgs(std::string optimizer, double lr, double beta1, double beta2, double eps,
           double weight_decay, bool nesterov, const MaybeTensor& lr_tensor)
      : optimizer(std::move(optimizer)),
        lr(lr_tensor ? read_scalar(*lr_tensor) : lr),
        beta1(beta1),
        beta2(beta2),
        eps(eps),
        weight_decay(weight_decay),
        nesterov(nesterov) {}

  // The rule and the state of one parameter; `step` counts the updates made before this one.
  template <class T>
  Target<T> target(T* value, const MaybeTensor& m, const MaybeTensor& v,
                   const MaybeTensor& step) const {
    UpdateRule<T> rule = {Rule::sgd, T(lr), T(beta1), T(beta2), T(1 - beta1), T(1 - beta2),
                          T(eps), T(weight_decay), T(lr), T(1)};
    if (optimizer == "sgd") {
      if (m) rule.rule = nesterov ? Rule::sgd_nesterov : Rule::sgd_momentum;
      return {rule, value, data<T>(m), nullptr};
    }
    rule.rule = parse<Rule>(optimizer, {{"adam", Rule::adam}, {"adamw", Rule::adamw}}, "optimizer");
    STD_TORCH_CHECK(m && v && step, "bpfree: ", optimizer, " needs m, v and step");
    const double count = read_scalar(*step) + 1;
    rule.step_size = T(lr / (1 - std::pow(beta1, count)));
    rule.inv_sqrt_correct = T(1 / std::sqrt(1 - std::pow(beta2, count)));
    return {rule, value, data<T>(m), data<T>(v)};
  }

  // The targets of a layer's weight and bias, with their state in schema order.
  template <class T>
  std::pair<Target<T>, Target<T>> layer(const Tensor& weight, const MaybeTensor& bias,
                                        const MaybeTensor& weight_m, const MaybeTensor& weight_v,
                                        const MaybeTensor& weight_step, const MaybeTensor& bias_m,
                                        const MaybeTensor& bias_v,
                                        const MaybeTensor& bias_step) const {
    const Target<T> to_weight = target<T>(data<T>(weight), weight_m, weight_v, weight_step);
    if (!bias) return {to_weight, {}};
    return {to_weight, target<T>(data<T>(*bias), bias_m, bias_v, bias_step)};
  }

  // The target of what learns beside a weight by `gain` times its gradient, if anything does.
  template <class T>
  Target<T> feedback(const MaybeTensor& feedback, double gain, const MaybeTensor& m,
                     const MaybeTensor& v, const MaybeTensor& step) const {
    if (!feedback) return {};
    Target<T> to = target<T>(data<T>(*feedback), m, v, step);
    to.rule.gain = static_cast<T>(gain);
    return to;
  }
};

// The targets of a layer's gradients, which are written, or added to what is there.
template <class T>
std::pair<Target<T>, Target<T>> layer_gradients(const Tensor& grad_weight,
                                                const MaybeTensor& grad_bias, bool accumulate) {
  UpdateRule<T> rule = {};
  rule.rule = accumulate ? Rule::accumulate : Rule::store;
  return {{rule, data<T>(grad_weight), nullptr, nullptr},
          {rule, data<T>(grad_bias), nullptr, nullptr}};
}

// Packs x [batch, in] for the forward product. `panels` holds the copy.
template <class T>
Input<T> pack_input(const Tensor& x, const Scratch<T>& panels) {
  const Input<T> input = {data<T>(x), panels.get(), x.size(0), x.size(1)};
  constexpr int64_t kColumnsPerTask = 256;
  torch::stable::parallel_for(0, input.in, kColumnsPerTask, [&](int64_t begin, int64_t end) {
    kernels<T>().pack(input.rows, input.batch, input.in, panels.get(), begin, end);
  });
  return input;
}

template <class T>
int64_t panel_elements(const Tensor& x) {
  const int64_t panel = kernels<T>().panel;
  return (x.size(0) + panel - 1) / panel * panel * x.size(1);
}

inline int64_t blocks(int64_t count, int64_t block) { return (count + block - 1) / block; }

}  // namespace bpfree::cpu
