// The parallel radix sort, against std::stable_sort.
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "catalogue.h"
#include "check.h"
#include "common/radix_sort.h"

namespace {

TEST(radix_sort_is_a_stable_sort) {
  Random random(0);
  for (int bits : {0, 1, 7, 11, 12, 22, 33, 40, 63, 64})
    for (std::int64_t size : {0, 1, 2, 1000})
      for (int threads : {1, 2, 3}) {
        const std::uint64_t mask = bits == 64 ? ~0ull : (std::uint64_t(1) << bits) - 1;
        const std::int64_t distinct = random.chance(0.5) ? 7 : std::int64_t(1) << 62;
        raddpo::SortBuffers buffers(size);
        std::vector<std::pair<std::uint64_t, std::uint32_t>> expected(size);
        for (std::int64_t i = 0; i < size; ++i) {
          const std::uint64_t key = (static_cast<std::uint64_t>(random.below(distinct)) * 0x9e3779b97f4a7c15) & mask;
          expected[i] = {buffers.keys[i] = key, buffers.values[i] = static_cast<std::uint32_t>(i)};
        }
        raddpo::Interrupt interrupt;
        raddpo::radix_sort(buffers, size, bits, threads, interrupt);
        std::stable_sort(expected.begin(), expected.end(),
                         [](const auto& a, const auto& b) { return a.first < b.first; });
        for (std::int64_t i = 0; i < size; ++i) {
          CHECK_EQUAL(buffers.keys[i], expected[i].first);
          CHECK_EQUAL(buffers.values[i], expected[i].second);
        }
      }
}

TEST(an_interrupt_stops_every_thread) {
  for (int threads : {1, 2, 3})
    for (const bool stops : {false, true}) {
      raddpo::Interrupt interrupt([&] {
        if (stops) throw std::runtime_error("stop");
      });
      std::vector<std::atomic<std::int64_t>> rows(threads);
      std::vector<std::int64_t> shares(threads);
      const std::int64_t size = std::int64_t(1) << (stops ? 30 : 20);  // seconds, or milliseconds
      raddpo::parallel_shares(threads, size, [&](int t, std::int64_t begin, std::int64_t end) {
        shares[t] = end - begin;
        interrupt.for_rows(t, begin, end, [&](std::int64_t) { rows[t].fetch_add(1, std::memory_order_relaxed); });
      });
      std::string error;
      try {
        interrupt.check();
      } catch (const std::runtime_error& stop) {
        error = stop.what();
      }
      CHECK_EQUAL(error, std::string(stops ? "stop" : ""));
      for (int t = 0; t < threads; ++t) CHECK(stops ? rows[t] < shares[t] : rows[t] == shares[t]);
    }
}

TEST(parallel_shares_cover_everything_once) {
  for (int threads : {1, 2, 5})
    for (std::int64_t size : {0, 1, 4, 100}) {
      std::vector<int> seen(size);
      raddpo::parallel_shares(threads, size, [&](int, std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) ++seen[i];
      });
      CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
    }
}

}  // namespace
