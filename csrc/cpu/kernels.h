// The boundary between op bodies (compiled once) and kernels (compiled once per instruction set).
//
// A body takes tensors apart into the plain structs below and calls kernels through a table of function
// pointers. Kernels know nothing of torch, and include no header whose inline functions could leak into
// other translation units with instructions that the machine may not have.
#pragma once

#include <cstdint>

#include "../activation.h"

namespace bpfree::cpu {

enum class Loss { ce, bce, mse, hinge };

// The loss of an output layer, with what it takes.
template <class T>
struct Objective {
  Loss loss;
  T scale;      // from the error to the gradient of the batch's loss
  T margin;     // of the hinge loss
  T off_class;  // weight of the other classes in the hinge loss
};

// What becomes of a gradient: kept, added to another, or turned into an update of the weight.
enum class Rule { store, accumulate, sgd, sgd_momentum, sgd_nesterov, adam, adamw };

// An update rule with everything that does not change within a step worked out beforehand.
template <class T>
struct UpdateRule {
  Rule rule;
  T lr;
  T beta1;  // momentum for SGD
  T beta2;
  T rest1;  // 1 - beta1 and 1 - beta2, formed in double: in float the difference loses digits
  T rest2;
  T eps;
  T weight_decay;
  T step_size;         // Adam: lr / (1 - beta1^t)
  T inv_sqrt_correct;  // Adam: 1 / sqrt(1 - beta2^t)
  T gain = T(1);       // factor of the gradient
};

// Where a gradient goes: the weight and its state, or for store and accumulate the gradient tensor. With a
// mask of zeros and ones, what is zero there is not updated; its gradient counts as 0.
template <class T>
struct Target {
  UpdateRule<T> rule;
  T* value;
  T* m;
  T* v;
  const uint8_t* mask = nullptr;

  // Inlined always: kernels of every instruction set call it.
  __attribute__((always_inline)) Target at(int64_t offset) const {
    return {rule, value ? value + offset : nullptr, m ? m + offset : nullptr,
            v ? v + offset : nullptr, mask ? mask + offset : nullptr};
  }
};

// A weight, and the feedback that learns beside it: its value is null where none does.
template <class T>
struct Targets {
  Target<T> weight;
  Target<T> feedback;

  __attribute__((always_inline)) Targets at(int64_t offset) const {
    return {weight.at(offset), feedback.at(offset)};
  }
};

// x [batch, in] as the kernels read it: rows for the update, transposed panels for the forward product.
template <class T>
struct Input {
  const T* rows;
  const T* panels;
  int64_t batch;
  int64_t in;
};

template <class T>
struct DrtpLinear {
  Input<T> x;
  const T* weight;     // [out, in]
  const T* bias;       // [out] or null
  const T* feedback;   // [classes, out]
  const int32_t* labels;  // -1 for a label out of range
  int64_t out;
  Activation activation;
  T slope;
  T* output;           // [batch, out]
  Target<T> to_weight;
  Target<T> to_bias;   // value is null without a bias
};

// The second pass through a dense layer. `change` is the change of its input, by which the change of z is
// W change; with `error`, z changes by (W feedback) error instead, and `change` is the feedback's rows.
template <class T>
struct PepitaLinear {
  Input<T> change;  // packed; batch is the number of samples, or of classes
  Input<T> error;   // packed [batch, classes], or without panels
  Input<T> pre;     // rows only
  const T* weight;  // [out, in]
  const T* z;       // [batch, out]
  const T* mask;    // [batch, out] or null
  int64_t out;
  Activation activation;
  T slope;
  T scale;          // of the gradient, the sign included
  T* difference;    // [batch, out]
  Target<T> to_weight;
  Target<T> to_bias;  // value is null without a bias
};

// Maps that are mixed from basis images by each sample's coefficients.
template <class T>
struct Mixture {
  T gain;                 // of the result
  const T* coefficients;  // [classes, batch]
  const T* basis;         // [classes, size]
  int64_t classes;
  int64_t batch;
  int64_t size;
};

// How max pooling's windows lie on maps [outer][height][width][inner].
struct Pooling {
  int64_t height, width, inner, rows, columns;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
};

// How the windows of a locally connected layer lie on its input (bpfree_kernels/geometry.py).
struct Windows {
  int64_t in, height, width;  // the input: channels of all groups, size
  int64_t out, rows, columns;  // the output
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups;
};

// Maps of the size that their use says, with the channels first or last in memory.
template <class T>
struct Maps {
  T* data;
  bool channels_last;
};

// A locally connected layer: weight [position][kernel_h, kernel_w, in/groups][out], its input x and what it
// feeds back from as [position][sample][channel].
template <class T>
struct LocalForward {
  Windows windows;
  int64_t batch;
  const T* x;
  const T* weight;
  const T* bias;  // [position][out] or null
  Activation activation;
  T slope;
  Maps<T> z;
  T* y;  // f(z), like z, or null
};

// Its input gradient, or feedback.
template <class T>
struct LocalFeedback {
  Windows windows;
  int64_t batch;
  const T* signal;
  const T* weight;
  const T* gate;  // like `change`, or null
  Activation activation;
  T slope;
  Maps<T> change;
};

// What it learns from a signal at its output.
template <class T>
struct LocalLearning {
  Windows windows;
  int64_t batch;
  Maps<const T> signal;
  const T* x;
  T scale;
  Target<T> to_weight;
  Target<T> to_bias;      // value is null without a bias
  Target<T> to_feedback;  // value is null without one
};

// What a convolution learns, as partial sums.
template <class T>
struct ConvLearning {
  Windows windows;
  Maps<const T> signal;  // [batch, out, rows, columns]
  Maps<const T> x;       // [batch, in, height, width]
};

// How an error comes back through a max pooling.
enum class Upsampling { argmax, nearest, average };

// Units with a target: maps of z, whose channels are the pooling's `inner`, and of their error.
template <class T>
struct ErrorMaps {
  Pooling pool;
  Upsampling upsample;
  Activation activation;
  T slope;
  T beta;
  Maps<const T> z;
  Maps<T> error;
};

// The units below a convolution, whose own error comes down through a packed error kernel.
template <class T>
struct ErrorKernel {
  ErrorMaps<T> below;
  Windows windows;
  Maps<const T> error;
  const T* packed;
};

// A convolution whose packed inverse reconstructs maps or carries an error down to them.
template <class T>
struct InverseConv {
  Windows windows;
  const T* packed;
  Activation activation;
  T slope;
  Maps<T> to;  // [batch, in, height, width]
};

// What a reconstruction starts from: f(z), nudged by `rate` towards the target if there is one.
template <class T>
struct Reconstruction {
  Maps<const T> output;
  Maps<const T> target;  // data may be null
  const T* rate;         // [batch]
  const T* bias;         // [out] or null
  Maps<const T> x;
};

template <class T>
struct Kernels {
  // Samples in a full panel of packed input; panels hold `in` rows of that many samples.
  int64_t panel;
  // Output rows that one work item of drtp_rows and forward_rows handles.
  int64_t row_block;
  // Input columns that one work item of update_columns handles.
  int64_t column_block;

  // Transposes x into panels, for input columns [begin, end).
  void (*pack)(const T* x, int64_t batch, int64_t in, T* panels, int64_t begin, int64_t end);
  // The fused DRTP layer for row blocks [begin, end); scratch as drtp_scratch says.
  void (*drtp_rows)(const DrtpLinear<T>&, int64_t begin, int64_t end, T* scratch);
  int64_t (*drtp_scratch)(int64_t batch);
  // z = x W^T + bias into z [batch, out], for row blocks [begin, end).
  void (*forward_rows)(const Input<T>&, const T* weight, const T* bias, int64_t out, T* z,
                       int64_t begin, int64_t end, T* scratch);
  // The same with the operands' roles changed, for fewer outputs than samples: rows of x against panels
  // of the weight, for samples [begin, end); weight.batch is the number of outputs.
  void (*forward_samples)(const T* x, const Input<T>& weight, const T* bias, T* z, int64_t begin,
                          int64_t end, T* scratch);
  // For either, with the size of the packed operand.
  int64_t (*forward_scratch)(int64_t packed);
  // Output, error, signal (if wanted) and loss of samples [begin, end); output holds the logits before.
  void (*classify)(const Objective<T>&, const int32_t* labels, int64_t classes, T* output, T* error,
                   T* signal, T* loss, int64_t begin, int64_t end);
  // Gradient of the weight, signal^T x, for column blocks [begin, end), sent to its targets.
  void (*update_columns)(const T* signal, int64_t out, const Input<T>&, const Targets<T>&,
                         int64_t begin, int64_t end, T* scratch);
  int64_t (*update_scratch)(int64_t batch);
  // Gradient of the bias: the signal summed over the batch, sent to its target.
  void (*update_bias)(const T* signal, int64_t stride, int64_t out, int64_t batch, const Target<T>&);
  // y = f(z) and signal = feedback[label] f'(z), for samples [begin, end) of `size` values each.
  void (*signal)(Activation, T slope, const T* z, const T* feedback, const int32_t* labels,
                 int64_t size, T* y, T* signal, int64_t begin, int64_t end);
  // y = f(z) for elements [begin, end).
  void (*activate)(Activation, T slope, const T* z, T* y, int64_t begin, int64_t end);
  // The second pass of a PEPITA layer and its update, for row blocks [begin, end).
  void (*pepita_rows)(const PepitaLinear<T>&, int64_t begin, int64_t end, T* scratch);
  int64_t (*pepita_scratch)(int64_t batch, int64_t classes);
  // y = f(z + change) - f(z) for elements [begin, end).
  void (*difference)(Activation, T slope, const T* z, const T* change, T* y, int64_t begin,
                     int64_t end);
  // The same with a mixture as the change, for column blocks [begin, end) of all samples; without z the
  // mixture itself.
  void (*mixed_difference)(Activation, T slope, const T* z, const Mixture<T>&, T* y, int64_t begin,
                           int64_t end, T* scratch);
  int64_t (*mixed_scratch)(int64_t classes);
  // The pooled maps of y, or with `change` how they change, for rows [begin, end) of all maps.
  void (*max_pool)(const Pooling&, const T* y, const T* change, T* pooled, int64_t begin,
                   int64_t end);
  // Maps of `size` positions [begin, end) as [position][sample][channel], times `scale`.
  void (*read_maps)(const Maps<const T>&, int64_t batch, int64_t channels, int64_t size, T scale,
                    int64_t begin, int64_t end, T* to);
  // A locally connected layer's output positions, input pixels and output positions [begin, end).
  void (*local_forward)(const LocalForward<T>&, int64_t begin, int64_t end, T* scratch);
  int64_t (*local_forward_scratch)(const Windows&, int64_t batch, int64_t positions);
  void (*local_feedback)(const LocalFeedback<T>&, int64_t begin, int64_t end, T* scratch);
  int64_t (*local_feedback_scratch)(const Windows&, int64_t batch, int64_t positions);
  void (*local_learn)(const LocalLearning<T>&, int64_t begin, int64_t end, T* scratch);
  int64_t (*local_learn_scratch)(const Windows&, int64_t batch, int64_t positions);
  // The gradient of rows [begin, end) of a group's weight, [in/groups][kernel], summed over samples, into g
  // with rows of whole vectors (conv_part: of all rows of all groups); of the group's bias, if not null.
  void (*conv_learn)(const ConvLearning<T>&, int64_t sample_begin, int64_t sample_end, int64_t group,
                     int64_t begin, int64_t end, T* g, T* bias, T* scratch);
  int64_t (*conv_learn_scratch)(const Windows&, int64_t rows);
  int64_t (*conv_part)(const Windows&);
  // Sums partial gradients and sends outputs [begin, end) of a group to the weight's targets.
  void (*conv_apply)(const Windows&, const T* parts, int64_t count, int64_t part_size, int64_t group,
                     int64_t begin, int64_t end, const Targets<T>&, T* scratch);
  int64_t (*conv_apply_scratch)(const Windows&);
  // Packs outputs [begin, end) of a kernel for conv_error_rows.
  void (*pack_kernel)(const Windows&, const T* weight, int64_t begin, int64_t end, T* packed);
  int64_t (*packed_elements)(const Windows&);
  // EKDAA's error of rows [begin, end) of one sample's units, from pooled maps, or through a convolution.
  void (*error_rows)(const ErrorMaps<T>&, const Maps<const T>& d, int64_t sample, int64_t begin,
                     int64_t end, T* scratch);
  int64_t (*error_rows_scratch)(const Pooling&, int64_t rows);
  void (*conv_error_rows)(const ErrorKernel<T>&, int64_t sample, int64_t begin, int64_t end, T* scratch);
  int64_t (*conv_error_rows_scratch)(const Windows&, const Pooling&, int64_t rows);
  // The input of rows [begin, end) of one sample, reconstructed.
  void (*reconstruct_rows)(const InverseConv<T>&, const Reconstruction<T>&, int64_t sample, int64_t begin,
                           int64_t end, T* scratch);
  // An error at those rows, times f' at `gate`, whose data may be null.
  void (*inverse_error_rows)(const InverseConv<T>&, const Maps<const T>& signal,
                             const Maps<const T>& gate, int64_t sample, int64_t begin, int64_t end,
                             T* scratch);
  int64_t (*inverse_scratch)(const Windows&, int64_t rows);
  // g = W W^T - I, [out, out], for blocks [begin, end) of `gram_rows` rows and what mirrors them.
  int64_t gram_rows;
  int64_t (*orthogonality_scratch)(int64_t out);
  void (*orthogonality_rows)(const Input<T>& weight, T* g, int64_t begin, int64_t end, T* scratch);
  // Packs scale times a signal [batch, out] for add_product, row blocks [begin, end) of its product.
  void (*pack_signal)(const T* signal, int64_t batch, int64_t out, T scale, bool off_diagonal, T* packed,
                      int64_t begin, int64_t end);
  int64_t (*packed_signal)(int64_t batch, int64_t out);
  // base + signal^T x for column blocks [begin, end), sent to its target, which may be x itself.
  void (*add_product)(const T* packed, int64_t out, const Input<T>& x, const T* base, const Target<T>&,
                      int64_t begin, int64_t end, T* scratch);
  // The sum of the squares of elements [begin, end).
  double (*sum_squares)(const T* from, int64_t begin, int64_t end);
  // Sends gradient elements [begin, end) to their target.
  void (*apply)(const T* gradient, const Target<T>&, int64_t begin, int64_t end);
};

// The kernels of one instruction set; a specialisation is defined by isa_kernels.cpp for each.
namespace baseline {
template <class T>
const Kernels<T>& table();
}
#if defined(__x86_64__)
namespace avx2 {
template <class T>
const Kernels<T>& table();
}
namespace avx512 {
template <class T>
const Kernels<T>& table();
}
#endif

}  // namespace bpfree::cpu
