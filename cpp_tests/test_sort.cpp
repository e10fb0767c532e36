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

__extension__ typedef unsigned __int128 Wide;

template <typename Row>
void check_sort(int bits, std::int64_t size, int threads, std::int64_t distinct) {
  constexpr int kLow = 17;
  const std::vector<Row> given = [&] {
    Random random(bits);
    std::vector<Row> rows;
    for (std::int64_t i = 0; i < size; ++i) {
      Row key = static_cast<std::uint64_t>(random.below(distinct)) * 0x9e3779b97f4a7c15;
      key *= key;  // into the upper half of a wide one
      rows.push_back(((key << kLow) & ((Row(1) << bits) - 1)) >> kLow << kLow | i);
    }
    return rows;
  }();
  for (const bool in_spare : {false, true}) {
    std::vector<Row> rows = given, spare = given, expected = given;
    std::fill_n((in_spare ? rows : spare).begin(), size, 0);
    std::vector<int> tied(size);  // of each row, how often it was said to have equals
    raddpo::Interrupt interrupt;
    raddpo::RadixSort<Row>(rows.data(), spare.data(), kLow, threads, interrupt,
                           [&](auto&, int, auto begin, auto end, int) {
                             for (auto i = begin; i < end; ++i) tied[i] += rows[i] >> kLow == rows[begin] >> kLow;
                           })
        .sort(size, std::max(bits, kLow), in_spare);
    std::sort(expected.begin(), expected.end());
    CHECK(rows == expected);
    for (std::int64_t i = 0; i < size; ++i) {
      const auto equal = [&](std::int64_t k) { return k >= 0 && k < size && rows[k] >> kLow == rows[i] >> kLow; };
      CHECK_EQUAL(tied[i], int(equal(i - 1) || equal(i + 1)));
    }
  }
}

TEST(radix_sort_is_a_stable_sort) {
  for (int bits : {17, 18, 24, 39, 63, 90, 127})
    for (std::int64_t size : {0, 1, 2, 24, 25, 1000, 100'000})
      for (int threads : {1, 2, 3})
        for (std::int64_t distinct : {1, 7, 1 << 30}) {
          check_sort<Wide>(bits, size, threads, distinct);
          if (bits < 64) check_sort<std::uint64_t>(bits, size, threads, distinct);
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
