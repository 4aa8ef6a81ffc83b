// Update rules: what becomes of a gradient (bpfree_kernels/update.py has the equations).
#pragma once

#include "kernels.h"
#include "math.h"

namespace bpfree::cpu::BPFREE_ISA {

template <Rule rule, class T>
inline void apply_lanes(const UpdateRule<T>& u, Vec<T> g, T* value, T* m, T* v, int64_t lanes) {
  if constexpr (rule == Rule::store) {
    store_lanes(value, g, lanes);
    return;
  }
  Vec<T> w = load_lanes(value, lanes);
  if constexpr (rule == Rule::accumulate) {
    store_lanes<T>(value, w + g, lanes);
    return;
  }
  if constexpr (rule == Rule::adamw) {
    w = w * (T(1) - u.lr * u.weight_decay);
  } else {
    g = g + u.weight_decay * w;
  }
  if constexpr (rule == Rule::sgd) {
    w = w - u.lr * g;
  } else if constexpr (rule == Rule::sgd_momentum || rule == Rule::sgd_nesterov) {
    const Vec<T> velocity = u.beta1 * load_lanes(m, lanes) + g;
    store_lanes<T>(m, velocity, lanes);
    w = w - u.lr * (rule == Rule::sgd_nesterov ? g + u.beta1 * velocity : velocity);
  } else if constexpr (rule == Rule::adam || rule == Rule::adamw) {
    const Vec<T> first = u.beta1 * load_lanes(m, lanes) + u.rest1 * g;
    const Vec<T> second = u.beta2 * load_lanes(v, lanes) + u.rest2 * g * g;
    store_lanes<T>(m, first, lanes);
    store_lanes<T>(v, second, lanes);
    w = w - u.step_size * first / (vsqrt<T>(second) * u.inv_sqrt_correct + u.eps);
  }
  store_lanes<T>(value, w, lanes);
}

// Sends `rows` rows of `count` gradient elements to their target, whose rows lie `stride` apart.
template <Rule rule, class T>
inline void apply_rows(const T* g, int64_t g_stride, int64_t rows, int64_t count,
                       const Target<T>& to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const Target<T> row = to.at(r * stride);
    const T* g_row = g + r * g_stride;
    for_vectors<T>(count, [&](int64_t i, int64_t lanes) {
      apply_lanes<rule, T>(to.rule, load_lanes(g_row + i, lanes), row.value + i, row.m + i,
                           row.v + i, lanes);
    });
  }
}

template <class T>
inline void apply_tile(const T* g, int64_t g_stride, int64_t rows, int64_t count,
                       const Target<T>& to, int64_t stride) {
  switch (to.rule.rule) {
#define BPFREE_RULE(name) \
  case Rule::name: return apply_rows<Rule::name, T>(g, g_stride, rows, count, to, stride)
    BPFREE_RULE(store);
    BPFREE_RULE(accumulate);
    BPFREE_RULE(sgd);
    BPFREE_RULE(sgd_momentum);
    BPFREE_RULE(sgd_nesterov);
    BPFREE_RULE(adam);
    BPFREE_RULE(adamw);
#undef BPFREE_RULE
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
