// Inverses of nearly orthogonal weights on the CPU (equations: bpfree_kernels/ops/inverse.py).
//
// The products are those of a dense layer: a series or a refinement in the forward's form, W as weight and as
// input; what is added to a weight in the update's form, the weight's rows as samples.
#include "inverse.h"

#include "dense_layer.h"

namespace bpfree::cpu {
namespace {

// One value of a tensor's dtype.
template <class T>
Tensor scalar(const Tensor& like, double value) {
  const Tensor result = new_output(like, {});
  *data<T>(result) = static_cast<T>(value);
  return result;
}

// A weight [out, ...] as rows.
template <class T>
Input<T> rows_of(const Tensor& weight) {
  const int64_t out = weight.size(0);
  return {data<T>(weight), nullptr, out, weight.numel() / out};
}

Tensor as_matrix(const Tensor& weight) {
  return torch::stable::flatten(weight, 1, -1);
}

// base + scale signal^T x to a target that may be x; all are [out, out].
template <class T>
void add_product(const Tensor& signal, double scale, bool off_diagonal, const Tensor& x,
                 const Tensor& base, const Target<T>& to) {
  const Kernels<T>& k = kernels<T>();
  const Input<T> input = rows_of<T>(x);
  const int64_t out = input.batch, count = blocks(out, k.row_block);
  const Scratch<T> packed(k.packed_signal(out, out));
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    k.pack_signal(data<T>(signal), out, out, static_cast<T>(scale), off_diagonal, packed.get(), begin,
                  end);
  });
  torch::stable::parallel_for(
      0, blocks(out, k.column_block), 1, [&](int64_t begin, int64_t end) {
        const Scratch<T> scratch(k.update_scratch(out));
        k.add_product(packed.get(), out, input, data<T>(base), to, begin, end, scratch.get());
      });
}

}  // namespace

Tensor orthogonality(Tensor weight) {
  const int64_t out = weight.size(0);
  const Tensor g = new_output(weight, {out, out});
  with_dtype(weight, [&]<class T>() {
    const Kernels<T>& k = kernels<T>();
    const Tensor rows = as_matrix(weight);
    const Scratch<T> panels(panel_elements<T>(rows));
    const Input<T> packed = pack_input<T>(rows, panels);
    const int64_t count = blocks(out, k.gram_rows);
    // The first rows have the most to do: each task takes one from either end.
    torch::stable::parallel_for(0, blocks(count, 2), 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> scratch(k.orthogonality_scratch(out));
      for (int64_t block = begin; block < end; ++block) {
        const int64_t other = count - 1 - block;
        k.orthogonality_rows(packed, data<T>(g), block, block + 1, scratch.get());
        if (other != block) {
          k.orthogonality_rows(packed, data<T>(g), other, other + 1, scratch.get());
        }
      }
    });
  });
  return g;
}

std::tuple<Tensor, Tensor> solve_nearly_orthogonal(Tensor signal, Tensor orthogonality,
                                                   double tolerance, int64_t max_terms) {
  const int64_t batch = signal.size(0), out = signal.size(1);
  const Tensor value = new_output(signal);
  const Tensor residual = with_dtype(signal, [&]<class T>() {
    const Kernels<T>& k = kernels<T>();
    const Tensor terms[] = {new_output(signal), new_output(signal)};
    std::vector<double> squares(batch);  // of each sample: threads change no digit of the sum
    const auto length = [&] {
      double total = 0;
      for (const double square : squares) total += square;
      return std::sqrt(total);
    };
    constexpr int64_t kElementsPerTask = 16384;
    const int64_t grain = kElementsPerTask / (out + 1) + 1;
    torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      std::copy(data<T>(signal) + begin * out, data<T>(signal) + end * out, data<T>(value) + begin * out);
      for (int64_t n = begin; n < end; ++n) {
        squares[n] = k.sum_squares(data<T>(signal), n * out, (n + 1) * out);
      }
    });
    const double whole = length();
    UpdateRule<T> adds = {};
    adds.rule = Rule::accumulate;
    double last = 0;
    for (int64_t term = 0; term < max_terms && whole != 0; ++term) {
      const Tensor& from = term == 0 ? signal : terms[(term - 1) % 2];
      const T* next = data<T>(terms[term % 2]);
      adds.gain = term % 2 ? T(1) : T(-1);  // the terms keep their sign, which alternates
      const Target<T> to = {adds, data<T>(value), nullptr, nullptr};
      dense_forward<T>(from, orthogonality, nullptr, data<T>(terms[term % 2]),
                       [&](int64_t begin, int64_t end) {
                         k.apply(next, to, begin * out, end * out);
                         for (int64_t n = begin; n < end; ++n) {
                           squares[n] = k.sum_squares(next, n * out, (n + 1) * out);
                         }
                       });
      last = length() / whole;
      if (last <= tolerance) break;
    }
    return scalar<T>(signal, last);
  });
  return {value, residual};
}

std::tuple<Tensor, Tensor> refine_inverse(Tensor weight, Tensor inverse) {
  const int64_t out = weight.size(0);
  const Tensor refined = new_output(inverse);
  const Tensor residual = with_dtype(weight, [&]<class T>() {
    const Kernels<T>& k = kernels<T>();
    const Tensor missing = new_output(weight, {out, out});  // I - W X^T: what R = I - X W^T is transposed
    T* values = data<T>(missing);
    std::vector<double> squares(out);
    dense_forward<T>(as_matrix(weight), as_matrix(inverse), nullptr, values,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t n = begin; n < end; ++n) {
                         T* row = values + n * out;
                         for (int64_t i = 0; i < out; ++i) row[i] = -row[i];
                         row[n] += T(1);
                         squares[n] = k.sum_squares(row, 0, out);
                       }
                     });
    UpdateRule<T> store = {};
    store.rule = Rule::store;
    add_product<T>(missing, 1, false, inverse, inverse, {store, data<T>(refined), nullptr, nullptr});
    double total = 0;
    for (const double square : squares) total += square;
    return scalar<T>(weight, std::sqrt(total / static_cast<double>(out)));
  });
  return {refined, residual};
}

void orthogonal_update(Tensor grad, Tensor orthogonality, Tensor weight, double penalty,
                       bool off_diagonal, StringHandle optimizer, double lr, double beta1, double beta2,
                       double eps, double weight_decay, bool nesterov, MaybeTensor lr_tensor,
                       MaybeTensor m, MaybeTensor v, MaybeTensor step) {
  const RuleArgs rule(take_string(optimizer), lr, beta1, beta2, eps, weight_decay, nesterov, lr_tensor);
  with_dtype(weight, [&]<class T>() {
    add_product<T>(orthogonality, 4 * penalty, off_diagonal, weight, grad,
                   rule.target<T>(data<T>(weight), m, v, step));
  });
}

}  // namespace bpfree::cpu
