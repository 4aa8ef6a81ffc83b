// The CPU kernels. This file is compiled once per instruction set, with BPFREE_ISA naming the set and the
// compiler told to use it; kernels.h picks one table at run time.
#include "classify_rows.h"
#include "conv_rows.h"
#include "drtp_rows.h"
#include "ekdaa_rows.h"
#include "inverse_rows.h"
#include "invertible_conv_rows.h"
#include "local_conv_rows.h"
#include "pepita_rows.h"
#include "pool_rows.h"

namespace bpfree::cpu::BPFREE_ISA {
namespace {

template <class T>
void apply(const T* gradient, const Target<T>& to, int64_t begin, int64_t end) {
  apply_tile<T>(gradient + begin, 0, 1, end - begin, to.at(begin), 0);
}

// In double: squares of float must not overflow, or lose the small ones.
template <class T>
double sum_squares(const T* from, int64_t begin, int64_t end) {
  double total[kLanes<double>] = {};
  for (int64_t i = begin; i < end; ++i) {
    const double value = from[i];
    total[(i - begin) % kLanes<double>] += value * value;
  }
  double sum = 0;
  for (const double lane : total) sum += lane;
  return sum;
}

}  // namespace

template <class T>
const Kernels<T>& table() {
  static const Kernels<T> kernels = {
      .panel = kPanel<T>,
      .row_block = kRowBlock,
      .column_block = kColumns<T>,
      .pack = pack<T>,
      .drtp_rows = drtp_rows<T>,
      .drtp_scratch = drtp_scratch<T>,
      .forward_rows = forward_rows<T>,
      .forward_samples = forward_samples<T>,
      .forward_scratch = forward_scratch<T>,
      .classify = classify<T>,
      .update_columns = update_columns<T>,
      .update_scratch = update_block_scratch<T>,
      .update_bias = update_bias<T>,
      .signal = signal_rows<T>,
      .activate = activate_elements<T>,
      .pepita_rows = pepita_rows<T>,
      .pepita_scratch = pepita_scratch<T>,
      .difference = difference_elements<T>,
      .mixed_difference = mixed_difference<T>,
      .mixed_scratch = mixed_scratch<T>,
      .max_pool = max_pool<T>,
      .read_maps = read_maps<T>,
      .local_forward = local_forward<T>,
      .local_forward_scratch = local_forward_scratch<T>,
      .local_feedback = local_feedback<T>,
      .local_feedback_scratch = local_feedback_scratch<T>,
      .local_learn = local_learn<T>,
      .local_learn_scratch = local_learn_scratch<T>,
      .conv_learn = conv_learn<T>,
      .conv_learn_scratch = conv_learn_scratch<T>,
      .conv_part = conv_part<T>,
      .conv_apply = conv_apply<T>,
      .conv_apply_scratch = conv_apply_scratch<T>,
      .pack_kernel = pack_kernel<T>,
      .packed_elements = packed_elements<T>,
      .error_rows = error_rows<T>,
      .error_rows_scratch = error_rows_scratch<T>,
      .conv_error_rows = conv_error_rows<T>,
      .conv_error_rows_scratch = conv_error_rows_scratch<T>,
      .reconstruct_rows = reconstruct_rows<T>,
      .inverse_error_rows = inverse_error_rows<T>,
      .inverse_scratch = inverse_scratch<T>,
      .gram_rows = kGramRows,
      .orthogonality_scratch = orthogonality_scratch<T>,
      .orthogonality_rows = orthogonality_rows<T>,
      .pack_signal = pack_signal<T>,
      .packed_signal = packed_signal<T>,
      .add_product = add_product<T>,
      .sum_squares = sum_squares<T>,
      .apply = apply<T>,
  };
  return kernels;
}

template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace bpfree::cpu::BPFREE_ISA
