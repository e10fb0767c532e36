#pragma once
// A stable radix sort on several threads, most significant digit first, and the loop splitting it uses. One pass over
// memory parts the rows into pieces that fit in a cache; each is then parted further there, down to a few rows.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
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

// Calls body(thread, i) for each i in [0, count), whichever thread is free; body must not throw.
template <typename Body>
void parallel_tasks(int threads, std::int64_t count, const Body& body) {
  std::atomic<std::int64_t> next{0};
  parallel_shares(threads, threads, [&](int t, std::int64_t, std::int64_t) {
    for (std::int64_t i; (i = next++) < count;) body(t, i);
  });
}

// Row: an unsigned integer whose bits from `low` on are the key and whose bits below ascend with the row's place.
template <typename Row>
class RadixSort {
 public:
  // Rows with equal keys, two or more; they may be given other keys and sorted by those: see sort_piece.
  using Ties = std::function<void(RadixSort& sort, int thread, std::int64_t begin, std::int64_t end, int word)>;
  struct Piece {
    std::int64_t begin, end;
    int high;       // from this bit on all its rows are equal
    bool in_spare;  // where they are
  };

  // `spare`: as large as `rows`.
  RadixSort(Row* rows, Row* spare, int low, int threads, Interrupt& interrupt, Ties ties = {})
      : rows_(rows), spare_(spare), low_(low), threads_(threads), interrupt_(interrupt), ties_(std::move(ties)) {}

  // Sorts all rows by the bits below `high`. Throws what the interrupt throws, with the rows in no order.
  void sort(std::int64_t size, int high, bool in_spare) {
    const std::int64_t large = std::max<std::int64_t>(kLarge, size / (8 * threads_));
    std::vector<Piece> open{{0, size, high, in_spare}}, pieces;
    while (!open.empty()) {
      const Piece piece = open.back();
      open.pop_back();
      if (piece.end - piece.begin < large || piece.high == low_)
        pieces.push_back(piece);
      else
        part(piece, open);
    }
    parallel_tasks(threads_, static_cast<std::int64_t>(pieces.size()), [&](int t, std::int64_t i) {
      if (!interrupt_.stopped(t)) sort_piece(t, pieces[i], 0);
    });
    interrupt_.check();
  }

  // Sorts a piece on one thread; `word` is handed on to the ties.
  void sort_piece(int t, Piece p, int word) {
    const std::int64_t size = p.end - p.begin;
    if (size <= kFew) return sort_few(t, p, word);
    const Row* from = p.in_spare ? spare_ : rows_;
    std::array<std::uint32_t, std::size_t(1) << kDigitBits> places;
    int width = 0, shift = p.high;
    do {  // until a digit tells rows apart
      p.high = shift;
      if (p.high == low_) {
        if (p.in_spare) std::copy(from + p.begin, from + p.end, rows_ + p.begin);
        if (ties_) ties_(*this, t, p.begin, p.end, word);
        return;
      }
      width = std::min({kDigitBits, std::max(1, width_of(size) - 2), p.high - low_});
      shift = p.high - width;
      std::fill_n(places.begin(), std::size_t(1) << width, 0);
      interrupt_.for_rows(t, p.begin, p.end, [&](std::int64_t i) { ++places[digit(from[i], shift, width)]; });
      if (interrupt_.stopped()) return;
    } while (places[digit(from[p.begin], shift, width)] == size);
    auto place = static_cast<std::uint32_t>(p.begin);
    for (int d = 0; d < 1 << width; ++d) place += std::exchange(places[d], place);
    Row* to = p.in_spare ? rows_ : spare_;
    interrupt_.for_rows(t, p.begin, p.end,
                        [&](std::int64_t i) { to[places[digit(from[i], shift, width)]++] = from[i]; });
    if (interrupt_.stopped()) return;
    std::int64_t begin = p.begin;
    for (int d = 0; d < 1 << width; ++d) {
      const std::int64_t end = places[d];
      if (end > begin) sort_piece(t, {begin, end, shift, !p.in_spare}, word);
      begin = end;
    }
  }

 private:
  static constexpr int kDigitBits = 11;
  static constexpr std::int64_t kFew = 24;         // rows that are sorted by insertion
  static constexpr std::int64_t kLarge = 1 << 14;  // rows that are worth several threads, or the parting in one pass

  static int width_of(std::int64_t size) { return 64 - __builtin_clzll(size); }
  static std::uint32_t digit(Row row, int shift, int width) {
    return static_cast<std::uint32_t>(row >> shift) & ((std::uint32_t(1) << width) - 1);
  }

  // Parts a piece by its first digit, on all threads.
  void part(const Piece& p, std::vector<Piece>& out) {
    const int width = std::min(kDigitBits, p.high - low_), shift = p.high - width;
    const std::int64_t size = p.end - p.begin;
    const Row* from = (p.in_spare ? spare_ : rows_) + p.begin;
    Row* to = (p.in_spare ? rows_ : spare_) + p.begin;
    std::vector<std::array<std::int64_t, std::size_t(1) << kDigitBits>> places(threads_);
    parallel_shares(threads_, size, [&](int t, std::int64_t begin, std::int64_t end) {
      places[t].fill(0);
      interrupt_.for_rows(t, begin, end, [&](std::int64_t i) { ++places[t][digit(from[i], shift, width)]; });
    });
    interrupt_.check();
    std::int64_t place = 0;
    for (int d = 0; d < 1 << width; ++d) {
      const std::int64_t first = place;
      for (auto& of_thread : places) place += std::exchange(of_thread[d], place);
      if (place - first == size) return out.push_back({p.begin, p.end, shift, p.in_spare});  // all rows share the digit
      if (place > first) out.push_back({p.begin + first, p.begin + place, shift, !p.in_spare});
    }
    parallel_shares(threads_, size, [&](int t, std::int64_t begin, std::int64_t end) {
      auto& of_thread = places[t];
      interrupt_.for_rows(t, begin, end,
                          [&](std::int64_t i) { to[of_thread[digit(from[i], shift, width)]++] = from[i]; });
    });
    interrupt_.check();
  }

  // By insertion, into place wherever they are. Whole rows are compared: among equal keys the places decide.
  void sort_few(int t, const Piece& p, int word) {
    const Row* from = p.in_spare ? spare_ : rows_;
    for (std::int64_t i = p.begin; i < p.end; ++i) {
      const Row row = from[i];
      std::int64_t at = i;
      for (; at > p.begin && rows_[at - 1] > row; --at) rows_[at] = rows_[at - 1];
      rows_[at] = row;
    }
    if (!ties_) return;
    for (std::int64_t begin = p.begin, end; begin < p.end; begin = end) {
      for (end = begin + 1; end < p.end && rows_[end] >> low_ == rows_[begin] >> low_;) ++end;
      if (end - begin > 1) ties_(*this, t, begin, end, word);
    }
  }

  Row *rows_, *spare_;
  int low_, threads_;
  Interrupt& interrupt_;
  Ties ties_;
};

}  // namespace raddpo
