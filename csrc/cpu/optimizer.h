// Update rules: what becomes of a gradient (bpfree_kernels/update.py has the equations).
#pragma once

#include "kernels.h"
#include "math.h"

namespace bpfree::cpu::BPFREE_ISA {

// `live` says which elements are updated, if `masked`: of those that are not, nothing changes.
template <Rule rule, bool masked, class T>
inline void apply_lanes(const UpdateRule<T>& u, Vec<T> g, T* value, T* m, T* v, VecBits<T> live,
                        int64_t lanes) {
  const auto change = [&](T* to, Vec<T> before, Vec<T> after) {
    store_lanes<T>(to, masked ? (live ? after : before) : after, lanes);
  };
  g = u.gain * g;
  if constexpr (rule == Rule::store) return change(value, Vec<T>{}, g);
  Vec<T> w = load_lanes(value, lanes);
  const Vec<T> before = w;
  if constexpr (rule == Rule::accumulate) return change(value, before, w + g);
  if constexpr (rule == Rule::adamw) {
    w = w * (T(1) - u.lr * u.weight_decay);
  } else {
    g = g + u.weight_decay * w;
  }
  if constexpr (rule == Rule::sgd) {
    w = w - u.lr * g;
  } else if constexpr (rule == Rule::sgd_momentum || rule == Rule::sgd_nesterov) {
    const Vec<T> old = load_lanes(m, lanes), velocity = u.beta1 * old + g;
    change(m, old, velocity);
    w = w - u.lr * (rule == Rule::sgd_nesterov ? g + u.beta1 * velocity : velocity);
  } else if constexpr (rule == Rule::adam || rule == Rule::adamw) {
    const Vec<T> old_m = load_lanes(m, lanes), old_v = load_lanes(v, lanes);
    const Vec<T> first = u.beta1 * old_m + u.rest1 * g;
    const Vec<T> second = u.beta2 * old_v + u.rest2 * g * g;
    change(m, old_m, first);
    change(v, old_v, second);
    w = w - u.step_size * first / (vsqrt<T>(second) * u.inv_sqrt_correct + u.eps);
  }
  change(value, before, w);
}

// The lanes whose byte is not zero.
template <class T>
inline VecBits<T> load_mask(const uint8_t* from, int64_t lanes) {
  if (lanes == kLanes<T>) return widen<T>(from) != 0;
  uint8_t bytes[kLanes<T>] = {};
  std::memcpy(bytes, from, static_cast<size_t>(lanes));
  return widen<T>(bytes) != 0;
}

// Sends `rows` rows of `count` gradient elements to their target, whose rows lie `stride` apart.
template <Rule rule, bool masked, class T>
inline void apply_rows(const T* g, int64_t g_stride, int64_t rows, int64_t count,
                       const Target<T>& to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const Target<T> row = to.at(r * stride);
    const T* g_row = g + r * g_stride;
    for_vectors<T>(count, [&](int64_t i, int64_t lanes) {
      const VecBits<T> live = masked ? load_mask<T>(row.mask + i, lanes) : VecBits<T>{};
      apply_lanes<rule, masked, T>(to.rule, load_lanes(g_row + i, lanes), row.value + i, row.m + i,
                                   row.v + i, live, lanes);
    });
  }
}

template <class T>
inline void apply_tile(const T* g, int64_t g_stride, int64_t rows, int64_t count,
                       const Target<T>& to, int64_t stride) {
  switch (to.rule.rule) {
#define BPFREE_RULE(name) \
  case Rule::name:        \
    return to.mask ? apply_rows<Rule::name, true, T>(g, g_stride, rows, count, to, stride) \
                   : apply_rows<Rule::name, false, T>(g, g_stride, rows, count, to, stride)
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

template <class T>
inline void apply_tile(const T* g, int64_t g_stride, int64_t rows, int64_t count,
                       const Targets<T>& to, int64_t stride) {
  apply_tile(g, g_stride, rows, count, to.weight, stride);
  if (to.feedback.value) apply_tile(g, g_stride, rows, count, to.feedback, stride);
}

}  // namespace bpfree::cpu::BPFREE_ISA
