// Inverses of nearly orthogonal weights on CUDA devices (equations: bpfree_kernels/ops/inverse.py).
//
// The products are torch's, in TF32 where torch's own switch says so; a kernel does what lies between two of
// them. Nothing waits for the device, so that a CUDA graph can hold every body.
#include "inverse.h"

#include "inverse.cuh"
#include "launch.h"
#include "update.cuh"

namespace bpfree::cuda {
namespace {

using torch::stable::matmul;

// A square weight [out, ...] as [out, out].
Tensor as_matrix(const Tensor& weight) {
  const int64_t size[] = {weight.size(0), weight.size(0)};
  return torch::stable::view(weight, {size, 2});
}

// Memory for the sums of squares of the blocks of a kernel over `count` elements.
Tensor block_sums(const Tensor& like, int64_t count) {
  const int64_t size[] = {blocks_for(count)};
  return torch::stable::new_empty(like, {size, 1}, torch::headeronly::ScalarType::Double);
}

// A learning rate or step count: a tensor on the device is read there; on the CPU reading is free.
Number number(const Tensor& tensor, const Stream& stream) {
  if (tensor.is_cuda()) {
    const bool is_double = tensor.scalar_type() == torch::headeronly::ScalarType::Double;
    return {0, tensor.data_ptr(), is_double};
  }
  STD_TORCH_CHECK(!stream.capturing(),
                  "a captured CUDA graph needs step and lr tensors on the device, got one on the CPU; "
                  "torch.optim.Adam(..., capturable=True) makes step there.");
  return {read_scalar(tensor), nullptr, false};
}

}  // namespace

Tensor orthogonality(Tensor weight) {
  const Stream stream(weight);
  const Tensor rows = as_matrix(weight);
  const Tensor result = matmul(rows, torch::stable::transpose(rows, 0, 1));
  with_dtype(weight, [&]<class T>() {
    stream.launch(rows.numel(), subtract_identity_kernel<T>, Divisor(rows.size(0)), data<T>(result));
  });
  return result;
}

std::tuple<Tensor, Tensor> solve_nearly_orthogonal(Tensor signal, Tensor orthogonality, double,
                                                   int64_t max_terms) {
  const Stream stream(signal);
  const int64_t count = signal.numel(), blocks = blocks_for(count);
  const Tensor value = new_output(signal), residual = new_output(signal, {});
  const Tensor of_signal = block_sums(signal, count), of_term = block_sums(signal, count);
  with_dtype(signal, [&]<class T>() {
    stream.launch(count, squares_kernel<T>, data<T>(signal), count, data<double>(of_signal));
    Tensor term = signal;  // without its sign, which alternates
    for (int64_t i = 0; i < max_terms; ++i) {
      term = matmul(term, orthogonality);
      stream.launch(count, add_term_kernel<T>, data<T>(i == 0 ? signal : value), data<T>(term),
                    i % 2 == 0 ? T(-1) : T(1), count, data<T>(value), data<double>(of_term));
    }
    stream.launch_block(residual_kernel<T>, data<double>(of_term), blocks, 0.0,
                        data<double>(of_signal), blocks, data<T>(residual));
  });
  return {value, residual};
}

std::tuple<Tensor, Tensor> refine_inverse(Tensor weight, Tensor inverse) {
  const Stream stream(weight);
  const Tensor rows = as_matrix(weight), start = as_matrix(inverse);
  const int64_t out = rows.size(0), count = rows.numel();
  const Tensor missing = matmul(start, torch::stable::transpose(rows, 0, 1));
  const Tensor squares = block_sums(weight, count), residual = new_output(weight, {});
  const Tensor refined = with_dtype(weight, [&]<class T>() {
    stream.launch(count, missing_kernel<T>, out, Divisor(out + 1), data<T>(missing),
                  data<double>(squares));
    stream.launch_block(residual_kernel<T>, data<double>(squares), blocks_for(count),
                        static_cast<double>(out), nullptr, int64_t{0}, data<T>(residual));
    const Tensor result = matmul(missing, start);
    stream.launch(count, add_kernel<T>, data<T>(start), count, data<T>(result));
    return result;
  });
  const std::vector<int64_t> shape(inverse.sizes().begin(), inverse.sizes().end());
  return {torch::stable::view(refined, {shape.data(), shape.size()}), residual};
}

void orthogonal_update(Tensor grad, Tensor orthogonality, Tensor weight, double penalty,
                       bool off_diagonal, StringHandle optimizer, double lr, double beta1,
                       double beta2, double eps, double weight_decay, bool nesterov,
                       MaybeTensor lr_tensor, MaybeTensor m, MaybeTensor v, MaybeTensor step) {
  const std::string name = take_string(optimizer);
  const Stream stream(weight);
  const auto kind = parse<Rule>(nesterov ? "nesterov" : name,
                                {{"sgd", Rule::sgd},
                                 {"nesterov", Rule::nesterov},
                                 {"adam", Rule::adam},
                                 {"adamw", Rule::adamw}},
                                "optimizer");
  const Number rate = lr_tensor ? number(*lr_tensor, stream) : Number{lr, nullptr, false};
  const Number count = step ? number(*step, stream) : Number{0, nullptr, false};
  const UpdateRule rule = {kind, rate, beta1, beta2, eps, weight_decay, count};
  STD_TORCH_CHECK(name == "sgd" || (m && v && step), "bpfree: ", name, " needs m, v and step");
  with_dtype(weight, [&]<class T>() {
    Tensor apart = orthogonality;
    if (off_diagonal) {
      apart = new_output(orthogonality);
      stream.launch(apart.numel(), clear_diagonal_kernel<T>, data<T>(orthogonality), apart.size(0),
                    Divisor(apart.size(0) + 1), data<T>(apart));
    }
    const Tensor regular = matmul(apart, as_matrix(weight));
    const Target<T> target = {data<T>(weight), data<T>(m), data<T>(v)};
    stream.launch(weight.numel(), update_kernel<T>, data<T>(grad), data<T>(regular),
                  static_cast<T>(4 * penalty), weight.numel(), rule, target);
  });
}

}  // namespace bpfree::cuda
