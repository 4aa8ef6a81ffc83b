// Update rules on the device (bpfree_kernels/update.py has the equations).
#pragma once

#include "device.cuh"

namespace bpfree::cuda {

enum class Rule { sgd, nesterov, adam, adamw };

// A number, or where it lies on the device: only the kernel knows what a captured graph will find there.
struct Number {
  double value;
  const void* address;  // null: the value counts
  bool is_double;       // what lies there, else it is a float

  __device__ double read() const {
    if (!address) return value;
    return is_double ? *static_cast<const double*>(address)
                     : static_cast<double>(*static_cast<const float*>(address));
  }
};

struct UpdateRule {
  Rule rule;
  Number lr;
  double beta1;  // momentum for SGD
  double beta2;
  double eps;
  double weight_decay;
  Number step;  // the updates made before this one
};

// A parameter, and what its rule remembers: m may be null for SGD, and v is.
template <class T>
struct Target {
  T* value;
  T* m;
  T* v;
};

// What of a rule is the same for every element, formed in double.
template <class T>
struct Scalars {
  T lr, step_size, correction;  // step_size is Adam's lr / (1 - beta1^t), correction 1 / sqrt(1 - beta2^t)
};

template <class T>
__device__ inline Scalars<T> prepare(const UpdateRule& rule) {
  const double lr = rule.lr.read();
  if (rule.rule == Rule::sgd || rule.rule == Rule::nesterov) return {T(lr), T(0), T(0)};
  const double count = rule.step.read() + 1;
  return {T(lr), T(lr / (1 - std::pow(rule.beta1, count))),
          T(1 / std::sqrt(1 - std::pow(rule.beta2, count)))};
}

template <class T>
__device__ inline void apply(const UpdateRule& rule, const Scalars<T>& scalars, T g,
                             const Target<T>& to, int64_t i) {
  T w = to.value[i];
  if (rule.rule == Rule::adamw) {
    w *= T(1) - scalars.lr * T(rule.weight_decay);
  } else {
    g += T(rule.weight_decay) * w;
  }
  if (rule.rule == Rule::sgd || rule.rule == Rule::nesterov) {
    T direction = g;
    if (to.m) {
      const T velocity = T(rule.beta1) * to.m[i] + g;
      to.m[i] = velocity;
      direction = rule.rule == Rule::nesterov ? g + T(rule.beta1) * velocity : velocity;
    }
    w -= scalars.lr * direction;
  } else {
    const T first = T(rule.beta1) * to.m[i] + T(1 - rule.beta1) * g;
    const T second = T(rule.beta2) * to.v[i] + T(1 - rule.beta2) * g * g;
    to.m[i] = first;
    to.v[i] = second;
    w -= scalars.step_size * first / (std::sqrt(second) * scalars.correction + T(rule.eps));
  }
  to.value[i] = w;
}

// Applies the gradient grad + scale regular.
template <class T>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const T* grad, const T* regular, T scale, int64_t count, UpdateRule rule,
                  Target<T> to) {
  __shared__ Scalars<T> scalars;
  if (threadIdx.x == 0) scalars = prepare<T>(rule);
  __syncthreads();
  for_each(count, [&](int64_t i) { apply(rule, scalars, grad[i] + scale * regular[i], to, i); });
}

}  // namespace bpfree::cuda
