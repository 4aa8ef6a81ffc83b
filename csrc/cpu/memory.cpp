#include "memory.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace bpfree::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr int64_t kPage = 4096;

// Stands before every buffer.
struct alignas(64) Header {
  int64_t bytes;
};

class Pool {
 public:
  Pool() {
    const char* megabytes = std::getenv("BPFREE_CPU_CACHE_MB");
    limit_ = (megabytes ? std::atoll(megabytes) : 64) * 1024 * 1024;
    free_.reserve(64);
  }

  // A free buffer of at least `bytes` and not much more, the last one returned first; null if none.
  Header* take(int64_t bytes) {
    // Never waits: a process forked while another thread was in here must not hang.
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (size_t i = free_.size(); i-- > 0;) {
      Header* buffer = free_[i];
      if (buffer->bytes >= bytes && buffer->bytes <= bytes + bytes / 4) {
        free_.erase(free_.begin() + i);
        held_ -= buffer->bytes;
        return buffer;
      }
    }
    return nullptr;
  }

  void give(Header* buffer) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || buffer->bytes > limit_) return release(buffer);
    while (held_ + buffer->bytes > limit_ || free_.size() == free_.capacity()) {
      held_ -= free_.front()->bytes;  // the one that was unused for longest
      release(free_.front());
      free_.erase(free_.begin());
    }
    held_ += buffer->bytes;
    free_.push_back(buffer);
  }

  static void release(Header* buffer) { ::operator delete(buffer, kAlignment); }

 private:
  std::mutex mutex_;
  std::vector<Header*> free_;
  int64_t held_ = 0;
  int64_t limit_ = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // lives on: tensors may be freed while the process ends
  return *instance;
}

}  // namespace

void* take_memory(int64_t bytes) {
  Header* buffer = nullptr;
  if (bytes >= kPooledBytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;  // neighbouring batch sizes share a buffer
    buffer = pool().take(bytes);
  }
  if (!buffer) {
    buffer = static_cast<Header*>(::operator new(sizeof(Header) + bytes, kAlignment));
    buffer->bytes = bytes;
  }
  return buffer + 1;
}

void return_memory(void* memory) {
  Header* buffer = static_cast<Header*>(memory) - 1;
  if (buffer->bytes >= kPooledBytes) {
    pool().give(buffer);
  } else {
    Pool::release(buffer);
  }
}

}  // namespace bpfree::cpu
