// Pack, sort, compare neighbours, write. A SID becomes one or a few 64-bit words of packed symbols; rows are sorted by
// word, last word first. In sorted order a row opens one new node at every depth beyond its common prefix with the row
// before it, and because nodes are numbered breadth first, each depth is written from front to back.
#include "trie_build.h"

#include <array>
#include <atomic>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "../common/radix_sort.h"

namespace raddpo {
namespace {

constexpr std::uint8_t kRepeat = 255;  // instead of a common prefix's length: the SID of the row before, again

int bit_width(std::uint64_t x) { return x ? 64 - __builtin_clzll(x) : 0; }

// Where each level is in the packed words. The first level has the highest bits of word 0.
struct Packing {
  int words = 0;
  std::array<int, kMaxLevels> word{}, shift{}, bits{};
  std::array<int, kMaxLevels> first_level{}, used{};  // per word

  Packing(const std::vector<std::int64_t>& num_symbols, int levels, bool absent) {
    for (int l = 0; l < levels; ++l) {
      bits[l] = bit_width(num_symbols[l] - 1 + absent);
      if (l == 0 || used[words - 1] + bits[l] > 64) first_level[words++] = l;
      word[l] = words - 1;
      used[words - 1] += bits[l];
    }
    std::array<int, kMaxLevels> left = used;
    for (int l = 0; l < levels; ++l) shift[l] = left[word[l]] -= bits[l];
  }
};

template <typename T>
class Builder {
 public:
  explicit Builder(const TrieBuildInput& input)
      : in_(input),
        sids_(static_cast<const T*>(input.sids)),
        n_(input.rows),
        threads_(input.threads),
        interrupt_(input.interrupt) {}

  TrieBytes build() {
    check_lengths();
    check_codes();
    report(0.1);
    check_item_ids();
    report(0.2);
    const Packing packing(num_symbols_, levels_, in_.lengths != nullptr);
    SortBuffers buffers(n_);
    sort(buffers, packing);
    buffers.spare_keys.release();
    buffers.spare_values.release();
    Buffer<std::uint8_t> prefixes(n_);
    const std::vector<Counts> starts = compare_neighbours(buffers, packing, prefixes);
    report(0.75);
    const TrieShape shape = shape_of(starts.back());
    TrieBlock out(shape);
    first_node_ = shape.first_node;
    copy_tables(out);
    emit(buffers, packing, prefixes, starts, out, shape.wide());
    TrieBytes bytes = out.finish();
    report(1.0);
    return bytes;
  }

 private:
  // Numbers of nodes and items per depth.
  struct Counts {
    Depths nodes{}, items{};
  };

  void report(double share) {
    interrupt_.check();
    if (in_.progress) in_.progress(share);
  }

  template <typename Body>
  void for_rows(const Body& body) {
    interrupt_.for_rows(0, 0, n_, body);
    interrupt_.check();
  }

  bool eos() const { return in_.eos >= 0; }
  int length_of(std::int64_t row) const {
    return static_cast<int>(in_.lengths ? in_.lengths[row] : in_.columns) + eos();
  }

  // The symbol of `row` at `level`, -1 beyond its end.
  std::int64_t symbol(std::int64_t row, int level) const {
    const std::int64_t length = in_.lengths ? in_.lengths[row] : in_.columns;
    if (level >= length) return level == length && eos() ? in_.levels[level].eos_symbol : -1;
    const auto code = static_cast<std::int64_t>(sids_[row * in_.columns + level]);
    return in_.levels[level].symbol_of_code.empty() ? code : in_.levels[level].symbol_of_code[code];
  }

  void check_lengths() {
    std::int64_t longest = in_.columns;
    if (in_.lengths) {
      longest = 0;
      for_rows([&](std::int64_t row) {
        if (in_.lengths[row] < 1 || in_.lengths[row] > in_.columns)
          refuse("lengths[", row, "] = ", in_.lengths[row], " is outside [1, ", in_.columns, "]");
        longest = std::max(longest, in_.lengths[row]);
      });
    }
    levels_ = static_cast<int>(longest) + eos();
  }

  // Every code must be within its level's size and have a token. Without a given size, the largest code sets it.
  void check_codes() {
    const int columns = static_cast<int>(in_.columns);
    std::vector<std::array<std::uint64_t, kMaxLevels>> largest(threads_);
    parallel_shares(threads_, n_, [&](int t, std::int64_t begin, std::int64_t end) {
      auto& most = largest[t];
      most.fill(0);
      interrupt_.for_rows(t, begin, end, [&](std::int64_t row) {
        const int length = in_.lengths ? static_cast<int>(in_.lengths[row]) : columns;
        for (int l = 0; l < length; ++l)  // a negative code becomes a huge one
          most[l] = std::max(most[l], static_cast<std::uint64_t>(sids_[row * columns + l]));
      });
    });
    interrupt_.check();
    bool gaps = false;
    for (int l = 0; l < columns; ++l) {
      std::uint64_t most = 0;
      for (const auto& part : largest) most = std::max(most, part[l]);
      const std::int64_t size = in_.levels[l].size;
      const std::uint64_t limit = size >= 0 ? size : INT32_MAX;
      if (most >= limit) refuse_code(l, limit);
      sizes_.push_back(size >= 0 ? size : static_cast<std::int64_t>(most) + 1);
      const auto& table = in_.levels[l].symbol_of_code;
      gaps |= std::find(table.begin(), table.end(), -1) != table.end();
    }
    const auto check_tokens = [&](std::int64_t row) {
      for (int l = 0; l < columns && l < length_of(row) - eos(); ++l)
        if (symbol(row, l) < 0)
          refuse("sids[", row, ", ", l, "] = ", +sids_[row * columns + l], " has no token in vocab.token_ids[", l, "]");
    };
    if (gaps) for_rows(check_tokens);
    for (std::size_t l = 0; l < in_.levels.size(); ++l) {
      const LevelSymbols& level = in_.levels[l];
      num_symbols_.push_back(level.tokens.empty() ? sizes_[l] : static_cast<std::int64_t>(level.tokens.size()));
    }
  }

  [[noreturn]] void refuse_code(int level, std::uint64_t limit) const {
    for (std::int64_t row = 0;; ++row) {
      const bool read = !in_.lengths || level < in_.lengths[row];
      if (read && static_cast<std::uint64_t>(sids_[row * in_.columns + level]) >= limit)
        refuse("sids[", row, ", ", level, "] = ", +sids_[row * in_.columns + level], " is outside [0, ", limit, ")");
    }
  }

  void check_item_ids() {
    if (!in_.item_ids) {
      wide_items_ = n_ - 1 > INT32_MAX;  // row numbers
      return;
    }
    std::int64_t most = 0;
    for_rows([&](std::int64_t row) {
      if (in_.item_ids[row] < 0) refuse("item_ids[", row, "] = ", in_.item_ids[row], " is negative");
      most = std::max(most, in_.item_ids[row]);
    });
    wide_items_ = most > INT32_MAX;
    SortBuffers b(n_);
    parallel_shares(threads_, n_, [&](int t, std::int64_t begin, std::int64_t end) {
      interrupt_.for_rows(t, begin, end, [&](std::int64_t row) {
        b.keys[row] = in_.item_ids[row];
        b.values[row] = static_cast<std::uint32_t>(row);
      });
    });
    radix_sort(b, n_, bit_width(most), threads_, interrupt_);
    for (std::int64_t i = 1; i < n_; ++i)
      if (b.keys[i] == b.keys[i - 1])
        refuse("item_ids[", b.values[i - 1], "] and item_ids[", b.values[i], "] are both ", b.keys[i]);
  }

  // Rows are visited in sorted order, which jumps in memory.
  void prefetch(const SortBuffers& b, std::int64_t i, std::int64_t end) const {
    constexpr std::int64_t kAhead = 16;
    if (i + kAhead < end) __builtin_prefetch(sids_ + b.values[i + kAhead] * in_.columns);
  }

  void sort(SortBuffers& b, const Packing& p) {
    const bool absent = in_.lengths != nullptr;  // then symbol 0 of a key means that the SID has ended
    for (int word = p.words - 1; word >= 0; --word) {
      const bool first = word == p.words - 1;
      const int begin_level = p.first_level[word], end_level = word + 1 < p.words ? p.first_level[word + 1] : levels_;
      parallel_shares(threads_, n_, [&](int t, std::int64_t begin, std::int64_t end) {
        interrupt_.for_rows(t, begin, end, [&](std::int64_t i) {
          const std::int64_t row = first ? i : b.values[i];
          if (!first) prefetch(b, i, end);
          std::uint64_t key = 0;
          for (int l = begin_level; l < end_level; ++l) key = key << p.bits[l] | (symbol(row, l) + absent);
          b.keys[i] = key;
          if (first) b.values[i] = static_cast<std::uint32_t>(row);
        });
      });
      radix_sort(b, n_, p.used[word], threads_, interrupt_);
      report(0.2 + 0.5 * (p.words - word) / p.words);
    }
  }

  // Fills prefixes; returns the counts before each thread's share and, last, the total.
  std::vector<Counts> compare_neighbours(const SortBuffers& b, const Packing& p, const Buffer<std::uint8_t>& prefixes) {
    const int word_levels = p.words > 1 ? p.first_level[1] : levels_;
    std::array<std::uint8_t, 65> level_of_width{};  // level of the highest differing bit in word 0
    for (int l = 0; l < word_levels; ++l)
      for (int bit = p.shift[l]; bit < p.shift[l] + p.bits[l]; ++bit)
        level_of_width[bit + 1] = static_cast<std::uint8_t>(l);
    std::vector<Counts> counts(threads_ + 1);
    std::vector<std::int64_t> prefix_of_next(threads_, -1);
    parallel_shares(threads_, n_, [&](int t, std::int64_t begin, std::int64_t end) {
      Counts& c = counts[t + 1];
      Depths opened{}, closed{};  // numbers of distinct rows by common prefix, and by length
      interrupt_.for_rows(t, begin, end, [&](std::int64_t i) {
        const std::int64_t row = b.values[i];
        const int length = length_of(row);
        int prefix = 0;
        if (i) {
          const std::uint64_t difference = b.keys[i] ^ b.keys[i - 1];
          const std::int64_t previous = b.values[i - 1];
          if (difference) {
            prefix = level_of_width[bit_width(difference)];
          } else {
            prefix = word_levels;
            while (prefix < levels_ && symbol(row, prefix) == symbol(previous, prefix)) ++prefix;
          }
          if (prefix >= length) {
            prefixes[i] = kRepeat;
            ++c.items[length];
            return;
          }
          if (prefix == length_of(previous) && prefix_of_next[t] < 0) prefix_of_next[t] = i - 1;
        }
        prefixes[i] = static_cast<std::uint8_t>(prefix);
        ++opened[prefix];
        ++closed[length];
        ++c.items[length];
      });
      std::int64_t open = 0;
      for (int d = 1; d <= levels_; ++d) {
        open += opened[d - 1];
        c.nodes[d] = open;
        open -= closed[d];
      }
    });
    interrupt_.check();
    for (std::int64_t i : prefix_of_next)
      if (i >= 0)
        refuse("sids[", b.values[i], "] = ", show(b.values[i]), " is a proper prefix of sids[", b.values[i + 1],
               "] = ", show(b.values[i + 1]), "; a vocab with eos tells them apart");
    for (int t = 0; t < threads_; ++t)
      for (int d = 0; d <= levels_; ++d) {
        counts[t + 1].nodes[d] += counts[t].nodes[d];
        counts[t + 1].items[d] += counts[t].items[d];
      }
    return counts;
  }

  std::string show(std::int64_t row) const {
    std::ostringstream text;
    for (int l = 0; l < length_of(row) - eos(); ++l) text << (l ? ", " : "(") << +sids_[row * in_.columns + l];
    return text.str() + ")";
  }

  TrieShape shape_of(const Counts& total) {
    TrieShape s;
    s.items = n_;
    s.levels = levels_;
    s.sid_levels = in_.columns;
    s.eos = in_.eos;
    s.has_vocab = in_.has_vocab;
    s.wide_items = wide_items_;
    s.first_node[1] = 1;
    for (int d = 1; d <= kMaxLevels; ++d) s.first_node[d + 1] = s.first_node[d] + total.nodes[d];
    s.nodes = s.first_node[levels_ + 1];
    for (int d = 1; d <= levels_; ++d) first_item_[d + 1] = first_item_[d] + total.items[d];
    for (std::size_t l = 0; l < in_.levels.size(); ++l) {
      const LevelSymbols& level = in_.levels[l];
      const bool table = !level.tokens.empty();
      s.num_symbols[l] = num_symbols_[l];
      s.table[l] = table ? s.table_size : -1;
      s.first_token[l] = level.first_token;
      s.max_token[l] = table ? level.tokens.back() : level.first_token + num_symbols_[l] - 1;
      s.table_size += static_cast<std::int64_t>(level.tokens.size());
    }
    std::copy(sizes_.begin(), sizes_.end(), s.sizes.begin());
    return s;
  }

  void copy_tables(const TrieBlock& out) const {
    auto *tokens = out.section<std::int32_t>(kTokens), *codes = out.section<std::int32_t>(kCodes);
    for (const LevelSymbols& level : in_.levels) {
      tokens = std::copy(level.tokens.begin(), level.tokens.end(), tokens);
      codes = std::copy(level.codes.begin(), level.codes.end(), codes);
    }
  }

  // Sets bits in ascending order; neighbours may share a word across threads and depths.
  struct BitWriter {
    std::uint64_t* bits = nullptr;
    std::int64_t word = 0;
    std::uint64_t value = 0;
    void set(std::int64_t position) {
      if (position >> 6 != word) {
        flush();
        word = position >> 6;
      }
      value |= std::uint64_t(1) << (position & 63);
    }
    void flush() {
      if (value) __atomic_fetch_or(bits + word, value, __ATOMIC_RELAXED);
      value = 0;
    }
  };

  void emit(const SortBuffers& b, const Packing& p, const Buffer<std::uint8_t>& prefixes,
            const std::vector<Counts>& starts, const TrieBlock& out, bool wide) {
    if (wide)
      wide_items_ ? emit_as<std::uint32_t, std::int64_t>(b, p, prefixes, starts, out)
                  : emit_as<std::uint32_t, std::int32_t>(b, p, prefixes, starts, out);
    else
      wide_items_ ? emit_as<std::uint16_t, std::int64_t>(b, p, prefixes, starts, out)
                  : emit_as<std::uint16_t, std::int32_t>(b, p, prefixes, starts, out);
  }

  template <typename Symbol, typename Item>
  void emit_as(const SortBuffers& b, const Packing& p, const Buffer<std::uint8_t>& prefixes,
               const std::vector<Counts>& starts, const TrieBlock& out) {
    auto* symbols = out.section<Symbol>(kSymbols);
    auto* items = out.section<Item>(kItems);
    const bool absent = in_.lengths != nullptr;
    std::atomic<std::int64_t> distinct{0};
    symbols[0] = 0;
    parallel_shares(threads_, n_, [&](int t, std::int64_t begin, std::int64_t end) {
      Depths next_node = first_node_, next_item = first_item_;
      std::array<BitWriter, kMaxLevels + 1> child_bits, item_bits;
      for (int d = 0; d <= levels_; ++d) {
        next_node[d] += starts[t].nodes[d];
        next_item[d] += starts[t].items[d];
        child_bits[d].bits = out.section<std::uint64_t>(kChildBits);
        item_bits[d].bits = out.section<std::uint64_t>(kItemBits);
      }
      next_node[0] = 1;
      std::int64_t rows = 0;
      interrupt_.for_rows(t, begin, end, [&](std::int64_t i) {
        if (p.words > 1) prefetch(b, i, end);
        const std::int64_t row = b.values[i];
        const int length = length_of(row);
        if (prefixes[i] != kRepeat) {
          ++rows;
          for (int d = prefixes[i] + 1; d <= length; ++d) {
            const std::int64_t node = next_node[d]++, parent = next_node[d - 1] - 1;
            const int l = d - 1;
            symbols[node] = static_cast<Symbol>(
                p.word[l] ? symbol(row, l)
                          : ((b.keys[i] >> p.shift[l]) & ((std::uint64_t(1) << p.bits[l]) - 1)) - absent);
            child_bits[d].set(node - 1 + parent);
          }
        }
        const std::int64_t item = next_item[length]++, leaf = next_node[length] - 1;
        items[item] = static_cast<Item>(in_.item_ids ? in_.item_ids[row] : row);
        item_bits[length].set(item + leaf);
      });
      for (BitWriter& writer : child_bits) writer.flush();
      for (BitWriter& writer : item_bits) writer.flush();
      distinct += rows;
    });
    interrupt_.check();
    out.header()[kNumSids] = distinct;
  }

  const TrieBuildInput& in_;
  const T* sids_;
  std::int64_t n_;
  int threads_, levels_ = 0;
  Interrupt interrupt_;
  bool wide_items_ = false;
  std::vector<std::int64_t> sizes_, num_symbols_;
  Depths first_node_{}, first_item_{};
};

}  // namespace

TrieBytes trie_build(const TrieBuildInput& input) {
  switch (input.sid_bytes) {
    case 1:
      return input.sid_signed ? Builder<std::int8_t>(input).build() : Builder<std::uint8_t>(input).build();
    case 2:
      return input.sid_signed ? Builder<std::int16_t>(input).build() : Builder<std::uint16_t>(input).build();
    case 4:
      return input.sid_signed ? Builder<std::int32_t>(input).build() : Builder<std::uint32_t>(input).build();
    default:
      return input.sid_signed ? Builder<std::int64_t>(input).build() : Builder<std::uint64_t>(input).build();
  }
}

}  // namespace raddpo
