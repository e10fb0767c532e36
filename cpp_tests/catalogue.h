#pragma once
// Random catalogues, the tries built from them, and what a plain map says of both.
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "trie_index/trie_build.h"
#include "trie_index/trie_view.h"

using Sid = std::vector<std::int64_t>;

struct Random {
  std::mt19937_64 engine;
  explicit Random(std::uint64_t seed) : engine(seed) {}
  std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(engine() % static_cast<std::uint64_t>(n)); }
  std::int64_t between(std::int64_t low, std::int64_t high) { return low + below(high - low + 1); }
  bool chance(double share) { return static_cast<double>(below(1 << 20)) < share * (1 << 20); }
};

// How a level's codes become tokens.
enum class Vocab { none, contiguous, table };

struct Catalogue {
  int columns = 0;
  Vocab vocab = Vocab::none;
  std::int64_t eos = -1;
  std::vector<std::vector<std::int32_t>> tokens;  // of each code of each level; empty without a vocab
  std::vector<Sid> sids;                          // of each row
  std::vector<std::int64_t> items;                // of each row

  // Up to `rows` rows over levels of up to `codes` codes.
  static Catalogue random(Random& random, int rows, int codes);
  Catalogue without_rows() const;
  void add(const Catalogue& other, std::size_t row);

  raddpo::TrieBytes build(int threads = 1, int code_bytes = 8, bool code_signed = true) const;

  // Whole token sequences, the end-of-sequence token included, with their items in input order.
  std::map<Sid, std::vector<std::int64_t>> by_tokens() const;
  // Columns that logits need.
  std::int64_t num_tokens() const;
};

inline const std::int64_t* header_of(const std::uint8_t* block) { return reinterpret_cast<const std::int64_t*>(block); }
inline raddpo::TrieView view_of(const raddpo::TrieBytes& trie, const std::uint8_t* live = nullptr) {
  return raddpo::view_of(trie.data.get(), header_of(trie.data.get()), live);
}
inline bool equal(const raddpo::TrieBytes& a, const raddpo::TrieBytes& b) {
  return a.size == b.size && std::equal(a.data.get(), a.data.get() + a.size, b.data.get());
}
