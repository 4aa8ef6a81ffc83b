#pragma once

#include <tuple>

#include "../tensors.h"

namespace bpfree::cuda {

Tensor orthogonality(Tensor weight);

std::tuple<Tensor, Tensor> solve_nearly_orthogonal(Tensor signal, Tensor orthogonality,
                                                   double tolerance, int64_t max_terms);

std::tuple<Tensor, Tensor> refine_inverse(Tensor weight, Tensor inverse);

void orthogonal_update(Tensor grad, Tensor orthogonality, Tensor weight, double penalty,
                       bool off_diagonal, StringHandle optimizer, double lr, double beta1,
                       double beta2, double eps, double weight_decay, bool nesterov,
                       MaybeTensor lr_tensor, MaybeTensor m, MaybeTensor v, MaybeTensor step);

}  // namespace bpfree::cuda
