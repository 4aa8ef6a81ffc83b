// What the bodies on every device do with torch's tensors. The public functions have checked shapes,
// dtypes and devices (bpfree_kernels/ops); what is checked here is only what would be unsafe to trust.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "activation.h"

namespace bpfree {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The string behind an argument of an op, which is freed. (Declared as std::string, an argument goes
// through a conversion in torch's headers that loses one on the heap at every call.)
inline std::string take_string(StringHandle handle) {
  size_t length = 0;
  const char* text = nullptr;
  STD_TORCH_CHECK(torch_string_length(handle, &length) == AOTI_TORCH_SUCCESS &&
                      torch_string_c_str(handle, &text) == AOTI_TORCH_SUCCESS,
                  "bpfree: a string cannot be read");
  const std::string result(text, length);
  STD_TORCH_CHECK(torch_delete_string(handle) == AOTI_TORCH_SUCCESS,
                  "bpfree: a string cannot be freed");
  return result;
}

template <class T>
T* data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "bpfree: a tensor is not contiguous");
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const MaybeTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// Calls f<float>() or f<double>(), as the tensor's dtype says.
template <class F>
auto with_dtype(const Tensor& tensor, F&& f) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double,
      "bpfree: this op takes float32 and float64 tensors");
  return tensor.scalar_type() == ScalarType::Float ? f.template operator()<float>()
                                                   : f.template operator()<double>();
}

// An uninitialised tensor of the dtype of `like`.
inline Tensor new_output(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()});
}

inline Tensor new_output(const Tensor& like) {
  return new_output(like, std::vector<int64_t>(like.sizes().begin(), like.sizes().end()));
}

template <class Enum>
Enum parse(const std::string& name, std::initializer_list<std::pair<const char*, Enum>> known,
           const char* what) {
  for (const auto& [known_name, value] : known) {
    if (name == known_name) return value;
  }
  STD_TORCH_CHECK(false, "bpfree: unknown ", what, " ", name);
  return known.begin()->second;
}

inline Activation parse_activation(const std::string& name) {
  return parse<Activation>(name,
                           {{"identity", Activation::identity},
                            {"relu", Activation::relu},
                            {"leaky_relu", Activation::leaky_relu},
                            {"tanh", Activation::tanh},
                            {"sigmoid", Activation::sigmoid},
                            {"hardtanh", Activation::hardtanh},
                            {"sign", Activation::sign}},
                           "activation");
}

inline double read_scalar(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == 1, "bpfree: lr and step must be CPU scalars");
  return with_dtype(tensor, [&]<class T>() { return static_cast<double>(*data<T>(tensor)); });
}

// Whether maps [batch, channels, height, width] lie with the channels last in memory.
inline bool channels_last(const Tensor& maps) {
  if (maps.is_contiguous()) return false;
  int64_t step = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {  // where there is one element, its stride is never taken
    STD_TORCH_CHECK(maps.size(dim) == 1 || maps.stride(dim) == step, "bpfree: maps have gaps");
    step *= maps.size(dim);
  }
  return true;
}

// Uninitialised maps that lie as `like` does.
inline Tensor new_maps(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  const int64_t batch = like.size(0);
  if (!channels_last(like)) return new_output(like, {batch, channels, height, width});
  const Tensor memory = new_output(like, {batch, height, width, channels});
  return torch::stable::transpose(torch::stable::transpose(memory, 1, 3), 2, 3);
}

}  // namespace bpfree
