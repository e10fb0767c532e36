// Bit streams and the positions of bits, against vectors of bools.
#include <cstdint>
#include <memory>
#include <vector>

#include "catalogue.h"
#include "check.h"
#include "common/math.h"
#include "trie_index/trie_math.h"

#define RADDPO_KERNELS "../../cpp_tests/bits.inl"
#include "common/foreach_isa.h"

namespace {

using Bits = std::vector<bool>;

// In exactly as many words as they need, so that AddressSanitizer sees a read past them.
struct Words {
  std::unique_ptr<std::uint64_t[]> words;
  explicit Words(std::size_t bits) : words(new std::uint64_t[(bits + 63) / 64]()) {}
  explicit Words(const Bits& bits) : Words(bits.size()) {
    for (std::size_t i = 0; i < bits.size(); ++i) words[i / 64] |= std::uint64_t(bits[i]) << (i % 64);
  }
  bool operator[](std::size_t i) const { return words[i / 64] >> (i % 64) & 1; }
};

Bits random_bits(Random& random, std::int64_t size, double ones) {
  Bits bits(size);
  for (std::int64_t i = 0; i < size; ++i) bits[i] = random.chance(ones);
  return bits;
}

TEST(bits_spread_and_gather) {
  Random random(0);
  for_each_isa([&] {
    for (int i = 0; i < 2000; ++i) {
      const std::uint64_t x = random.engine();
      const std::uint64_t mask = i == 0 ? 0 : i == 1 ? ~0ull : random.engine() & random.engine();
      std::uint64_t spread = 0, gathered = 0;
      for (int bit = 0, k = 0; bit < 64; ++bit)
        if (mask >> bit & 1) {
          spread |= (x >> k & 1) << bit;
          gathered |= (x >> bit & 1) << k++;
        }
      CHECK_EQUAL(RADDPO_CALL_ISA(spread_bits, x, mask), spread);
      CHECK_EQUAL(RADDPO_CALL_ISA(gather_bits, x, mask), gathered);
    }
  });
}

TEST(bits_splice) {
  Random random(1);
  for_each_isa([&] {
    for (int i = 0; i < 500; ++i) {
      const Bits from = random_bits(random, random.between(1, i % 2 ? 300 : 3000), 0.5);
      const std::int64_t begin = random.between(0, static_cast<std::int64_t>(from.size()));
      const std::int64_t end = random.between(begin, static_cast<std::int64_t>(from.size()));
      const std::int64_t ones = random.below(200), at = random.below(130), size = at + end - begin + ones;
      Words in(from.size() + 64), out(size + 64);  // one word more
      for (std::size_t k = 0; k < from.size(); ++k) in.words[k / 64] |= std::uint64_t(from[k]) << (k % 64);
      // What is before has been written, and ends in the first word; what is behind is any memory.
      for (std::int64_t word = 0; word <= size / 64; ++word) out.words[word] = ~0ull;
      out.words[at / 64] = (1ull << (at % 64)) - 1;
      CHECK_EQUAL(RADDPO_CALL_ISA(splice_bits, in.words.get(), begin, end, ones, out.words.get(), at), size);
      for (std::int64_t k = 0; k < size; ++k)
        CHECK_EQUAL(out[k], k < at || k >= at + end - begin || from[begin + k - at]);
      if (size > at)
        for (std::int64_t k = size; k % 64; ++k) CHECK_EQUAL(out[k], false);
    }
  });
}

TEST(bits_select_in_a_word) {
  Random random(2);
  for (int i = 0; i < 2000; ++i) {
    const std::uint64_t word = i == 0 ? ~0ull : random.engine() & random.engine();
    for (int bit = 0, k = 0; bit < 64; ++bit)
      if (word >> bit & 1) CHECK_EQUAL(raddpo::select_bit(word, k++), bit);
  }
}

// The number of ones before each bit and the place of each one, by the ranks of 512 bits.
TEST(bits_live_ranks) {
  Random random(3);
  for (double share : {0.0, 0.01, 0.5, 1.0})
    for (std::int64_t size : {1, 63, 64, 511, 512, 513, 3000}) {
      const Bits bits = random_bits(random, size, share);
      const std::int64_t blocks = raddpo::LiveLayout::blocks_of(size);
      Words words(static_cast<std::size_t>(blocks * raddpo::kBlockBits));
      for (std::int64_t i = 0; i < size; ++i) words.words[i / 64] |= std::uint64_t(bits[i]) << (i % 64);
      std::vector<std::uint32_t> ranks(blocks);
      for (std::int64_t block = 1; block < blocks; ++block) {
        ranks[block] = ranks[block - 1];
        for (std::int64_t i = 0; i < raddpo::kBlockBits; ++i)
          ranks[block] += !words[(block - 1) * raddpo::kBlockBits + i];
      }
      const raddpo::LiveBits live{words.words.get(), ranks.data()};
      std::int64_t before = 0;
      for (std::int64_t i = 0; i < size; ++i) {
        CHECK_EQUAL(raddpo::live_before(live, i), before);
        if (!bits[i]) continue;
        CHECK_EQUAL(raddpo::nth_live(live, size, before), i);
        ++before;
      }
      CHECK_EQUAL(raddpo::live_before(live, size), before);
    }
}

}  // namespace
