// Working memory of a thread, aligned for any vector.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace ups {

struct Aligned {
  explicit Aligned(size_t bytes) : data(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
    if (data == nullptr) throw std::bad_alloc();
  }
  ~Aligned() { std::free(data); }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  void* const data;
};

}  // namespace ups
