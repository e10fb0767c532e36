#pragma once
// How a long computation on several threads is stopped early.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <utility>

namespace raddpo {

// `ask`, if there is one, is called on thread 0, the one that computes for its caller, every 50 ms or so: what it
// throws stops all threads, and is thrown again by check().
class Interrupt {
 public:
  explicit Interrupt(std::function<void()> ask = {}) : ask_(std::move(ask)) {}

  // body(i) for the rows [begin, end), unless stopped on the way.
  template <typename Body>
  void for_rows(int thread, std::int64_t begin, std::int64_t end, const Body& body) {
    constexpr std::int64_t kStretch = 1 << 14;
    while (begin < end && !stopped(thread))
      for (const std::int64_t stretch = std::min(begin + kStretch, end); begin < stretch; ++begin) body(begin);
  }

  // On thread 0, while no other runs.
  void check() {
    stopped(0);
    if (error_) std::rethrow_exception(error_);
  }

  // Whether for_rows may have left out rows.
  bool stopped() const { return stop_; }

  // The same after asking, where that is due.
  bool stopped(int thread) {
    if (thread == 0 && ask_ && !stop_ && Clock::now() >= next_) {
      try {
        ask_();
      } catch (...) {
        error_ = std::current_exception();
        stop_ = true;
      }
      next_ = Clock::now() + std::chrono::milliseconds(50);
    }
    return stop_;
  }

 private:
  using Clock = std::chrono::steady_clock;

  std::function<void()> ask_;
  Clock::time_point next_ = Clock::now();
  std::atomic<bool> stop_{false};
  std::exception_ptr error_;
};

}  // namespace raddpo
