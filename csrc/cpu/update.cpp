// An update rule applied to one parameter (equations: bpfree_kernels/update.py).
#include "update.h"

namespace bpfree::cpu {

void apply_update(Tensor param, Tensor grad, StringHandle optimizer, double lr, double beta1,
                  double beta2, double eps, double weight_decay, bool nesterov,
                  MaybeTensor lr_tensor, MaybeTensor m, MaybeTensor v, MaybeTensor step) {
  const RuleArgs rule(take_string(optimizer), lr, beta1, beta2, eps, weight_decay, nesterov, lr_tensor);
  with_dtype(param, [&]<class T>() {
    const Target<T> target = rule.target<T>(data<T>(param), m, v, step);
    constexpr int64_t kElementsPerTask = 16384;
    torch::stable::parallel_for(0, param.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      kernels<T>().apply(data<T>(grad), target, begin, end);
    });
  });
}

}  // namespace bpfree::cpu
