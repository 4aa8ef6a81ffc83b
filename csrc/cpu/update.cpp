// An update rule applied to one parameter (equations: bpfree_kernels/update.py).
#include "update.h"

namespace bpfree::cpu {
namespace {

constexpr int64_t kElementsPerTask = 16384;

// The Euclidean length of a gradient; summed in blocks of a fixed size, so that threads change no digit.
template <class T>
double norm(const Tensor& gradient) {
  const T* from = data<T>(gradient);
  const int64_t count = gradient.numel();
  std::vector<double> squares(blocks(count, kElementsPerTask));
  torch::stable::parallel_for(
      0, static_cast<int64_t>(squares.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kElementsPerTask;
          const int64_t last = first + kElementsPerTask < count ? first + kElementsPerTask : count;
          squares[block] = kernels<T>().sum_squares(from, first, last);
        }
      });
  double total = 0;
  for (const double square : squares) total += square;
  return std::sqrt(total);
}

}  // namespace

void apply_update(Tensor param, Tensor grad, double scale, double max_norm, StringHandle optimizer,
                  double lr, double beta1, double beta2, double eps, double weight_decay,
                  bool nesterov, MaybeTensor lr_tensor, MaybeTensor m, MaybeTensor v,
                  MaybeTensor step) {
  const RuleArgs rule(take_string(optimizer), lr, beta1, beta2, eps, weight_decay, nesterov, lr_tensor);
  with_dtype(param, [&]<class T>() {
    Target<T> target = rule.target<T>(data<T>(param), m, v, step);
    double gain = scale;
    if (std::isfinite(max_norm)) {
      const double length = std::abs(scale) * norm<T>(grad);
      if (length > max_norm) gain *= max_norm / length;
    }
    target.rule.gain = static_cast<T>(gain);
    torch::stable::parallel_for(0, param.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      kernels<T>().apply(data<T>(grad), target, begin, end);
    });
  });
}

}  // namespace bpfree::cpu
