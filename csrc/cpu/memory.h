// Memory that is used again at the next step.
//
// A training step asks for the same large buffers every time. glibc gives them back to the system in
// between and takes them anew, page by page: about 110 page faults a step of 784-1000-10 at batch 60,
// which can cost as much as the products. So freed buffers stay here, up to a limit (BPFREE_CPU_CACHE_MB,
// 64 by default, 0 for none).
#pragma once

#include <cstdint>

namespace bpfree::cpu {

// Below this a buffer comes from where all small objects come from.
inline constexpr int64_t kPooledBytes = 16 * 1024;

// At least `bytes` bytes, uninitialised, cache-line aligned.
void* take_memory(int64_t bytes);
void return_memory(void* memory);

}  // namespace bpfree::cpu
