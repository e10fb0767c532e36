#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>

namespace raddpo {

// Python's MemoryError.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::int64_t bytes) {
    std::snprintf(text_, sizeof text_, "out of memory: tried to allocate %lld bytes", static_cast<long long>(bytes));
  }
  const char* what() const noexcept override { return text_; }

 private:
  char text_[80];
};

// Uninitialised memory: its pages are first touched by the threads that fill it.
template <typename T>
struct Buffer {
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data;
  explicit Buffer(std::int64_t size = 0) {
    if (!size) return;
    data.reset(static_cast<T*>(std::malloc(size * sizeof(T))));
    if (!data) throw OutOfMemory(size * sizeof(T));
  }
  T& operator[](std::int64_t i) const { return data[i]; }
  T* get() const { return data.get(); }
  void release() { data.reset(); }
};

}  // namespace raddpo
