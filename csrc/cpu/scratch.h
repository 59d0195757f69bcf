// Working memory of a thread, aligned for any vector.
#pragma once

#include <stdlib.h>  // posix_memalign

#include <cstddef>
#include <new>

namespace ups {

struct Aligned {
  explicit Aligned(size_t bytes) {
    // Not std::aligned_alloc, which macOS has only from 10.15 on.
    if (posix_memalign(&data, 64, bytes + (bytes == 0)) != 0) throw std::bad_alloc();
  }
  ~Aligned() { free(data); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  void* data = nullptr;
};

}  // namespace ups
