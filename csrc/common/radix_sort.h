#pragma once
// A stable radix sort of 64-bit keys with 32-bit values on several threads, and the loop splitting it uses.
#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

#include "buffer.h"
#include "interrupt.h"

namespace raddpo {

// Calls body(thread, begin, end) on equal shares of [0, size), one thread each; body must not throw.
template <typename Body>
void parallel_shares(int threads, std::int64_t size, const Body& body) {
  const auto run = [&](int t) { body(t, size * t / threads, size * (t + 1) / threads); };
  std::vector<std::thread> others;
  others.reserve(threads);
  int begun = 1;
  try {
    for (; begun < threads; ++begun) others.emplace_back(run, begun);
  } catch (const std::exception&) {  // no more threads are to be had: the other shares are done here
  }
  run(0);
  for (int t = begun; t < threads; ++t) run(t);
  for (std::thread& other : others) other.join();
}

struct SortBuffers {
  Buffer<std::uint64_t> keys, spare_keys;
  Buffer<std::uint32_t> values, spare_values;
  explicit SortBuffers(std::int64_t n) : keys(n), spare_keys(n), values(n), spare_values(n) {}
};

// Sorts keys and values by the low `bits` bits of the keys, least significant digit first. A digit that all keys share
// costs one reading pass. Throws what the interrupt throws, with the rows in no order.
inline void radix_sort(SortBuffers& b, std::int64_t n, int bits, int threads, Interrupt& interrupt) {
  const int passes = (bits + 10) / 11, width = passes ? (bits + passes - 1) / passes : 0;
  const std::uint64_t mask = (std::uint64_t(1) << width) - 1;
  std::vector<std::array<std::int64_t, 2048>> starts(threads);
  for (int shift = 0; shift < bits; shift += width) {
    parallel_shares(threads, n, [&](int t, std::int64_t begin, std::int64_t end) {
      starts[t].fill(0);
      interrupt.for_rows(t, begin, end, [&](std::int64_t i) { ++starts[t][(b.keys[i] >> shift) & mask]; });
    });
    interrupt.check();
    std::int64_t position = 0;
    bool constant = false;
    for (std::uint64_t digit = 0; digit <= mask; ++digit) {
      const std::int64_t first = position;
      for (auto& start : starts) position += std::exchange(start[digit], position);
      constant |= position - first == n;
    }
    if (constant) continue;
    parallel_shares(threads, n, [&](int t, std::int64_t begin, std::int64_t end) {
      auto& start = starts[t];
      interrupt.for_rows(t, begin, end, [&](std::int64_t i) {
        const std::int64_t to = start[(b.keys[i] >> shift) & mask]++;
        b.spare_keys[to] = b.keys[i];
        b.spare_values[to] = b.values[i];
      });
    });
    interrupt.check();
    std::swap(b.keys, b.spare_keys);
    std::swap(b.values, b.spare_values);
  }
}

}  // namespace raddpo
