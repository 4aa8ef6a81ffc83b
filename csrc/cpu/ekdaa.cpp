// EKDAA's errors on the CPU (equations: bpfree_kernels/ops/ekdaa.py).
//
// A work item owns some rows of one sample's units: it carries the error down to them, up-samples it, and forms
// target and difference while all of that is in its core's cache.
#include "ekdaa.h"

#include "maps.h"
#include "mix.h"

namespace bpfree::cpu {
namespace {

Upsampling parse_upsampling(const std::string& name) {
  return parse<Upsampling>(name,
                           {{"argmax", Upsampling::argmax},
                            {"nearest", Upsampling::nearest},
                            {"average", Upsampling::average}},
                           "up-sampling");
}

template <class T>
ErrorMaps<T> error_maps(const Pooling& pool, const std::string& upsample, const std::string& activation,
                        double slope, double beta, const Tensor& z, const Tensor& error) {
  return {pool, parse_upsampling(upsample), parse_activation(activation), static_cast<T>(slope),
          static_cast<T>(beta), maps<const T>(z), maps<T>(error)};
}

// In steps of the pooling's stride, so that blocks share few windows.
MapRows cut_rows(const Pooling& pool) {
  return {pool.height, pool.width * pool.inner, pool.stride_h};
}

}  // namespace

Tensor ekdaa_error(Tensor change, Tensor z, double beta, StringHandle upsample, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                   int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t dilation_h,
                   int64_t dilation_w, StringHandle activation, double slope) {
  const Pooling pool = {z.size(2), z.size(3), z.size(1), change.size(2), change.size(3), kernel_h, kernel_w,
                        stride_h,  stride_w,  pad_top,   pad_left,       dilation_h,     dilation_w};
  const std::string how = take_string(upsample), f = take_string(activation);
  const Tensor error = new_maps(z, z.size(1), z.size(2), z.size(3));
  with_dtype(z, [&]<class T>() {
    const Kernels<T>& k = kernels<T>();
    const auto units = error_maps<T>(pool, how, f, slope, beta, z, error);
    const Maps<const T> d = maps<const T>(change);
    for_rows<T>(cut_rows(pool), z.size(0), [&](int64_t rows) { return k.error_rows_scratch(pool, rows); },
                [&](int64_t sample, int64_t begin, int64_t end, T* scratch) {
                  k.error_rows(units, d, sample, begin, end, scratch);
                });
  });
  return error;
}

Tensor ekdaa_linear_error(Tensor error, Tensor feedback, Tensor z, double beta,
                          StringHandle activation, double slope) {
  const Tensor result = new_output(z);
  const Activation kind = parse_activation(take_string(activation));
  with_dtype(z, [&]<class T>() {
    mix<T>(error, feedback, z.size(1), {kind, static_cast<T>(slope), static_cast<T>(-beta), T(-1)},
           data<T>(z), data<T>(result));
  });
  return result;
}

Tensor ekdaa_conv_error(Tensor error, Tensor feedback, Tensor z, double beta, int64_t stride_h,
                        int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t dilation_h,
                        int64_t dilation_w, int64_t groups, int64_t rows, int64_t columns,
                        StringHandle upsample, int64_t pool_h, int64_t pool_w, int64_t pool_stride_h,
                        int64_t pool_stride_w, int64_t pool_top, int64_t pool_left,
                        int64_t pool_dilation_h, int64_t pool_dilation_w, StringHandle activation,
                        double slope) {
  const Pooling pool = {z.size(2),     z.size(3),     z.size(1), rows,      columns,
                        pool_h,        pool_w,        pool_stride_h, pool_stride_w, pool_top,
                        pool_left,     pool_dilation_h, pool_dilation_w};
  const Windows windows =
      conv_windows(feedback, {rows, columns}, {error.size(2), error.size(3)}, stride_h, stride_w, pad_top,
                   pad_left, dilation_h, dilation_w, groups);
  const std::string how = take_string(upsample), f = take_string(activation);
  const Tensor result = new_maps(z, z.size(1), z.size(2), z.size(3));
  with_dtype(z, [&]<class T>() {
    const Kernels<T>& k = kernels<T>();
    const Scratch<T> packed(k.packed_elements(windows));
    torch::stable::parallel_for(0, windows.out, 16, [&](int64_t begin, int64_t end) {
      k.pack_kernel(windows, data<T>(feedback), begin, end, packed.get());
    });
    const ErrorKernel<T> layer = {error_maps<T>(pool, how, f, slope, beta, z, result), windows,
                                  maps<const T>(error), packed.get()};
    for_rows<T>(cut_rows(pool), z.size(0),
                [&](int64_t count) { return k.conv_error_rows_scratch(windows, pool, count); },
                [&](int64_t sample, int64_t begin, int64_t end, T* scratch) {
                  k.conv_error_rows(layer, sample, begin, end, scratch);
                });
  });
  return result;
}

}  // namespace bpfree::cpu
