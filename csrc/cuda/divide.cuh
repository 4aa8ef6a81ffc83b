// Division by a number that is the same for all threads: a multiplication and a shift instead of the
// call that a 64-bit division is on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bpfree::cuda {

// n / divisor = (n + (n magic >> 64)) >> shift with 2^shift >= divisor > 2^(shift - 1), exact for
// 0 <= n < 2^63 (Granlund and Montgomery, 1994). The size of what is empty, 0, divides nothing.
class Divisor {
 public:
  Divisor(int64_t divisor) : divisor_(static_cast<uint64_t>(divisor)) {
    while (uint64_t{1} << shift_ < divisor_) ++shift_;
    if (divisor_ == 0) return;
    const uint64_t above = (uint64_t{1} << shift_) - divisor_;
    magic_ = static_cast<uint64_t>((static_cast<unsigned __int128>(above) << 64) / divisor_) + 1;
  }

  __device__ int64_t quotient(int64_t n) const {
    const uint64_t whole = static_cast<uint64_t>(n);
    const uint64_t high =
        static_cast<uint64_t>(static_cast<unsigned __int128>(whole) * magic_ >> 64);
    return static_cast<int64_t>((whole + high) >> shift_);
  }

  __device__ int64_t remainder(int64_t n) const { return n - quotient(n) * value(); }

  __device__ int64_t value() const { return static_cast<int64_t>(divisor_); }

 private:
  uint64_t divisor_;
  uint64_t magic_ = 0;
  int shift_ = 0;
};

}  // namespace bpfree::cuda
