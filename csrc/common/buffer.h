#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace raddpo {

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
    if (!data) throw std::bad_alloc();
  }
  T& operator[](std::int64_t i) const { return data[i]; }
  T* get() const { return data.get(); }
  void release() { data.reset(); }
};

}  // namespace raddpo
