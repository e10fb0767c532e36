#pragma once
// Changes to an index file that get past its outer checks.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/trie_index/trie_build.h"
#include "../csrc/trie_index/trie_check.h"
#include "../csrc/trie_index/trie_view.h"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

// Magic, version, size and checksum as if `data`, at least a header, had been written so.
inline void sign(std::uint8_t* data, std::size_t size) {
  auto* h = reinterpret_cast<std::uint64_t*>(data);
  std::memcpy(h, "RADTRIE", 8);
  h[raddpo::kVersion] = raddpo::kFormatVersion;
  h[raddpo::kBytes] = size;
  h[raddpo::kChecksum] = raddpo::trie_checksum(data, static_cast<std::int64_t>(size));
}

class Mutator {
 public:
  Mutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed)
      : data_(data), size_(size), most_(most), random_(seed) {}

  std::size_t mutate() {
    if (size_ < kHeader || below(50) == 0) fresh();
    if (size_ < kHeader) return size_ = LLVMFuzzerMutate(data_, size_, most_);
    for (std::uint64_t changes = 1 + below(3); changes; --changes) {
      switch (below(8)) {
        case 0:
          size_ = std::max(kHeader, LLVMFuzzerMutate(data_, size_, most_));
          break;
        case 1:
        case 2:
          header_word();
          break;
        default:
          section();
      }
    }
    if (below(2)) index_bits();
    return size_;
  }

 private:
  static constexpr std::size_t kHeader = raddpo::kHeaderWords * 8;

  std::uint64_t below(std::uint64_t n) { return std::uniform_int_distribution<std::uint64_t>(0, n - 1)(random_); }
  std::int64_t word(int i) const {
    std::int64_t value;
    std::memcpy(&value, data_ + 8 * i, 8);
    return value;
  }

  void header_word() {
    const auto& name = raddpo::kHeaderNames[below(std::size(raddpo::kHeaderNames))];
    const int at = name.word + static_cast<int>(below(std::min(name.count, 6)));
    const std::int64_t interesting[] = {0, -1, 1, 64, INT32_MAX, INT64_MAX, INT64_MIN, std::int64_t(1) << 32};
    std::int64_t value = word(at);
    switch (below(4)) {
      case 0:
        value = static_cast<std::int64_t>(std::uint64_t(value) + below(5) - 2);
        break;
      case 1:
        value = word(static_cast<int>(below(raddpo::kHeaderEnd)));
        break;
      case 2:
        value = interesting[below(std::size(interesting))];
        break;
      default:
        value = static_cast<std::int64_t>(std::uint64_t(value) ^ std::uint64_t(1) << below(64));
    }
    std::memcpy(data_ + 8 * at, &value, 8);
  }

  // A few bytes of one section, or of the whole where the header does not tell.
  void section() {
    const int at = raddpo::kSymbols + static_cast<int>(below(raddpo::kCodes - raddpo::kSymbols + 1));
    std::int64_t begin = word(at), end = at < raddpo::kCodes ? word(at + 1) : static_cast<std::int64_t>(size_);
    const auto size = static_cast<std::int64_t>(size_);
    if (begin < 0 || begin >= size || end <= begin || end > size) begin = 0, end = size;
    const auto place =
        begin + static_cast<std::int64_t>(below(std::min<std::int64_t>(end - begin, below(2) ? 64 : end)));
    switch (below(4)) {
      case 0:
        data_[place] ^= static_cast<std::uint8_t>(1 << below(8));
        break;
      case 1:
        data_[place] = static_cast<std::uint8_t>(data_[place] + 1 - 2 * below(2));
        break;
      case 2:
        std::swap(data_[place], data_[begin + static_cast<std::int64_t>(below(end - begin))]);
        break;
      default:
        LLVMFuzzerMutate(data_ + place, std::min<std::int64_t>(end - place, 8), std::min<std::int64_t>(end - place, 8));
    }
  }

  // The ranks and hints of whatever the bits now are, where the sections are in bounds.
  void index_bits() {
    using namespace raddpo;
    const std::int64_t nodes = word(kNumNodes), items = word(kNumItems), size = static_cast<std::int64_t>(size_);
    if (nodes < 2 || nodes > size || items < 1 || items > size) return;
    for (const auto& [bits, count] : {std::pair{kChildBits, 2 * nodes - 1}, std::pair{kItemBits, nodes + items}}) {
      const std::int64_t blocks = (count + kBlockBits - 1) / kBlockBits, hints = (nodes - 1) / kHintZeros + 2;
      const std::int64_t at = word(bits), ranks = word(bits + 1), to = word(bits + 2);
      if (at < 0 || at % 8 || at > size - blocks * 64 || ranks < 0 || ranks > size - blocks * 4 || to < 0 ||
          to > size - hints * 4)
        return;
      std::vector<std::uint32_t> zeros(blocks + 1), hint(hints, static_cast<std::uint32_t>(blocks - 1));
      for (std::int64_t block = 0; block < blocks; ++block) {
        zeros[block + 1] = zeros[block];
        for (int i = 0; i < 64; ++i) zeros[block + 1] += 8 - __builtin_popcount(data_[at + block * 64 + i]);
        for (std::int64_t k = 0; k + 1 < hints; ++k)
          if (k * kHintZeros >= zeros[block] && k * kHintZeros < zeros[block + 1])
            hint[k] = static_cast<std::uint32_t>(block);
      }
      std::memcpy(data_ + ranks, zeros.data(), blocks * 4);
      std::memcpy(data_ + to, hint.data(), hints * 4);
    }
  }

  // A small sound index.
  void fresh() {
    raddpo::TrieBuildInput input{};
    const std::int64_t rows = 1 + static_cast<std::int64_t>(below(below(16) ? 12 : 600)), columns = 1 + below(4);
    const std::int64_t size = 1 + static_cast<std::int64_t>(below(below(2) ? 3 : 40));
    const bool eos = below(2), vocab = eos || below(2), wide = below(8) == 0;
    std::vector<std::int64_t> sids(rows * columns), lengths(rows, columns), ids(rows);
    for (auto& code : sids) code = static_cast<std::int64_t>(below(size)) + (wide && below(2) ? 70000 : 0);
    for (std::int64_t row = 0; row < rows; ++row) {
      if (eos) lengths[row] = 1 + static_cast<std::int64_t>(below(columns));
      ids[row] = row * (below(2) ? 1 : 5) + (row ? ids[row - 1] + 1 : wide ? std::int64_t(1) << 31 : 0);
    }
    for (std::int64_t l = 0; l < columns + eos; ++l) {
      raddpo::LevelSymbols level;
      level.size = l == columns ? 0 : !vocab ? -1 : size + (wide ? 70000 : 0);
      if (vocab) level.first_token = static_cast<std::int32_t>(10 + below(9));
      if (eos && l) {  // tokens 10, 11, .. of the codes, and 5 to end with
        level.first_token = 0;
        level.eos_symbol = 0;
        level.tokens = {5};
        level.codes = {-1};
        for (std::int32_t code = 0; code < level.size; ++code) {
          level.symbol_of_code.push_back(code + 1);
          level.tokens.push_back(code + 10);
          level.codes.push_back(code);
        }
      }
      input.levels.push_back(level);
    }
    input.sids = sids.data();
    input.sid_bytes = 8;
    input.sid_signed = true;
    input.rows = rows;
    input.columns = columns;
    input.lengths = lengths.data();
    input.item_ids = ids.data();
    input.eos = eos ? 5 : -1;
    input.has_vocab = vocab;
    const raddpo::TrieBytes block = raddpo::trie_build(input);
    raddpo::trie_check(block.data.get(), block.size, 1);  // ends the run where the builder's own is refused
    if (block.size > static_cast<std::int64_t>(most_)) return;
    std::memcpy(data_, block.data.get(), block.size);
    size_ = block.size;
  }

  std::uint8_t* data_;
  std::size_t size_, most_;
  std::minstd_rand random_;
};
