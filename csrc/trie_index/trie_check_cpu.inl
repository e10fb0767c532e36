// The passes over a block's bits and symbols, 64 at a time.
#include "bit_stream.h"

namespace raddpo::RADDPO_ISA {
namespace {

template <typename Symbol>
RADDPO_HD SymbolsFound check(const SymbolCheck& c) {
  const auto* symbols = static_cast<const Symbol*>(c.symbols);
  Symbol largest = 0;
  std::uint64_t descend = 0, astray = 0;
  for (std::int64_t begin = c.begin, end; begin < c.end; begin = end) {
    end = (begin | 63) + 1 < c.end ? (begin | 63) + 1 : c.end;  // the nodes of one word
    const int n = static_cast<int>(end - begin), shift = static_cast<int>(begin % 64);
    std::uint8_t above[64], ends[64];
    const auto eos = static_cast<Symbol>(c.eos);
#pragma omp simd reduction(max : largest)
    for (int i = 0; i < n; ++i) {
      const Symbol symbol = symbols[begin + i];
      above[i] = symbol > symbols[begin + i - 1];
      ends[i] = symbol == eos;
      largest = symbol > largest ? symbol : largest;
    }
    const std::uint64_t leaves = ~c.inner[begin / 64] >> shift & low_bits(n);
    descend |= ~(pack(above, n) | c.first[begin / 64] >> shift) & low_bits(n);
    if (c.eos >= -1) astray |= (c.eos < 0 ? 0 : pack(ends, n)) ^ leaves;
  }
  return {static_cast<std::int64_t>(largest), !descend, !astray};
}

template <typename Id>
RADDPO_HD IdsFound range_of(const Id* ids, std::int64_t begin, std::int64_t end) {
  Id least = ids[begin], largest = ids[begin];
#pragma omp simd reduction(min : least) reduction(max : largest)
  for (std::int64_t i = begin; i < end; ++i) {
    least = ids[i] < least ? ids[i] : least;
    largest = ids[i] > largest ? ids[i] : largest;
  }
  return {least, largest};
}

}  // namespace

// Whether the rank after each of these blocks counts the block's zeros. A rank below the one before it has wrapped.
bool ranks_follow(const std::uint64_t* bits, std::int64_t begin, std::int64_t end, const std::uint32_t* ranks) {
  std::uint32_t wrong = 0;
  for (std::int64_t block = begin; block < end; ++block) {
    std::uint32_t zeros = kBlockBits;
    for (int i = 0; i < kBlockBits / 64; ++i) zeros -= popcount(bits[block * (kBlockBits / 64) + i]);
    wrong |= ((ranks[block + 1] - ranks[block]) ^ zeros) | (ranks[block + 1] < ranks[block]);
  }
  return !wrong;
}

// One bit per zero in [begin, end) of a degree sequence, which begins after a zero: whether its node has a one.
void mark_zeros(const std::uint64_t* bits, std::int64_t begin, std::int64_t end, std::uint64_t* out) {
  BitReader in{bits, begin};
  BitAppender marks{out, 0};
  std::uint64_t before = 0;
  while (in.at < end) {
    const int n = end - in.at < 64 ? static_cast<int>(end - in.at) : 64;
    const std::uint64_t run = in.next(n), zeros = ~run & low_bits(n);
    marks.put(gather(run << 1 | before, zeros), popcount(zeros));
    before = run >> (n - 1);
  }
}

// One bit per one in [begin, end): whether it is the first of its node. `root`: preceded by a set bit for the root.
void mark_ones(const std::uint64_t* bits, std::int64_t begin, std::int64_t end, bool root, std::uint64_t* out) {
  BitReader in{bits, begin};
  BitAppender marks{out, 0};
  if (root) marks.put(1, 1);
  std::uint64_t before = begin ? bits[(begin - 1) / 64] >> ((begin - 1) % 64) & 1 : 0;
  while (in.at < end) {
    const int n = end - in.at < 64 ? static_cast<int>(end - in.at) : 64;
    const std::uint64_t run = in.next(n);
    marks.put(gather(~(run << 1 | before), run), popcount(run));
    before = run >> (n - 1);
  }
}

SymbolsFound check_symbols(const SymbolCheck& c) { return c.wide ? check<std::uint32_t>(c) : check<std::uint16_t>(c); }

IdsFound check_ids(const void* ids, bool wide, std::int64_t begin, std::int64_t end) {
  return wide ? range_of(static_cast<const std::int64_t*>(ids), begin, end)
              : range_of(static_cast<const std::int32_t*>(ids), begin, end);
}

}  // namespace raddpo::RADDPO_ISA
