// The rows of an output layer: from logits to output, error, signal and loss.
#pragma once

#include "activation.h"

namespace bpfree::cpu::BPFREE_ISA {

// The rows of an output layer: logits in y become outputs, and *loss the sample's loss. A label below 0 is
// no class: a target of zeros, and for the hinge loss all classes are others.
template <class T>
void softmax_row(T* y, int64_t classes, int32_t label, T* loss) {
  T peak = y[0];
  for (int64_t c = 1; c < classes; ++c) peak = y[c] > peak ? y[c] : peak;
  const T shifted = label < 0 ? T(0) : y[label] - peak;
  Vec<T> total = {};
  for_vectors<T>(classes, [&](int64_t c, int64_t lanes) {
    const Vec<T> e = vexp<T>(load_lanes(y + c, lanes) - peak);
    store_lanes<T>(y + c, e, lanes);
    total += lanes < kLanes<T> ? first_lanes<T>(e, lanes) : e;
  });
  const T mass = sum<T>(total);
  for (int64_t c = 0; c < classes; ++c) y[c] /= mass;
  *loss = label < 0 ? T(0) : natural_log(mass) - shifted;
}

// Binary cross-entropy with logits, stable on both sides: max(z, 0) + log(1 + e^-|z|), where z changes its
// sign for the label.
template <class T>
void sigmoid_row(T* y, int64_t classes, int32_t label, T* loss) {
  if (label >= 0) y[label] = -y[label];
  Vec<T> total = {};
  for_vectors<T>(classes, [&](int64_t c, int64_t lanes) {
    const Vec<T> z = load_lanes(y + c, lanes);
    const Vec<T> terms = vmax<T>(z, Vec<T>{}) + vlog1p<T>(vexp<T>(-vabs<T>(z)));
    total += lanes < kLanes<T> ? first_lanes<T>(terms, lanes) : terms;
  });
  if (label >= 0) y[label] = -y[label];
  for_vectors<T>(classes, [&](int64_t c, int64_t lanes) {
    store_lanes<T>(y + c, vsigmoid<T>(load_lanes(y + c, lanes)), lanes);
  });
  *loss = sum<T>(total) / T(classes);
}

template <class T>
void linear_row(T* y, int64_t classes, int32_t label, T* loss) {
  T total = T(0);
  for (int64_t c = 0; c < classes; ++c) {
    const T difference = y[c] - (c == label ? T(1) : T(0));
    total += difference * difference;
  }
  *loss = total / T(classes);
}

// The multi-class hinge loss, whose output are the logits. One on a threshold keeps its gradient.
template <class T>
void hinge_row(const Objective<T>& of, const T* z, int64_t classes, int32_t label, T* error,
               T* loss) {
  T others = T(0);
  for (int64_t c = 0; c < classes; ++c) {
    const T slack = of.margin + z[c];
    error[c] = slack >= T(0) ? of.off_class : T(0);
    others += c == label || slack < T(0) ? T(0) : slack;
  }
  *loss = of.off_class * others;
  if (label >= 0) {
    const T slack = of.margin - z[label];
    error[label] = slack >= T(0) ? T(-1) : T(0);
    *loss += slack < T(0) ? T(0) : slack;
  }
}

template <class T>
void classify(const Objective<T>& of, const int32_t* labels, int64_t classes, T* output, T* error,
              T* signal, T* loss, int64_t begin, int64_t end) {
  const auto row = of.loss == Loss::ce    ? softmax_row<T>
                   : of.loss == Loss::bce ? sigmoid_row<T>
                                          : linear_row<T>;
  for (int64_t n = begin; n < end; ++n) {
    T* y = output + n * classes;
    T* e = error + n * classes;
    if (of.loss == Loss::hinge) {
      hinge_row(of, y, classes, labels[n], e, loss + n);
    } else {
      row(y, classes, labels[n], loss + n);
      for (int64_t c = 0; c < classes; ++c) e[c] = y[c] - (c == labels[n] ? T(1) : T(0));
    }
    if (!signal) continue;
    for (int64_t c = 0; c < classes; ++c) signal[n * classes + c] = of.scale * e[c];
  }
}

}  // namespace bpfree::cpu::BPFREE_ISA
