// Pack, sort, compare neighbours, write. A SID becomes packed symbols above its row's number, as one unsigned integer
// if they fit in 128 bits; what does not fit is packed and sorted later, among the rows that are equal before it. In
// sorted order a row opens one new node at every depth beyond its common prefix with the row before it, and because
// nodes are numbered breadth first, each depth is written from front to back.
#include "trie_build.h"

#include <array>
#include <atomic>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "../common/huge_pages.h"
#include "../common/radix_sort.h"
#include "node_writer.h"

namespace raddpo {
namespace {

template <typename T>
class Builder {
 public:
  explicit Builder(const TrieBuildInput& input)
      : in_(input), sids_(input), n_(input.rows), threads_(input.threads), interrupt_(input.interrupt) {}

  TrieBytes build() {
    check_lengths();
    check_codes();
    report(0.1);
    check_item_ids();
    report(0.2);
    const Packing packing(num_symbols_, levels_, sids_.absent(), n_);
    return packing.narrow() ? built_from<std::uint64_t>(packing) : built_from<Wide>(packing);
  }

 private:
  // Row: a SID's packed symbols, and below them its row's number.
  template <typename Row>
  TrieBytes built_from(const Packing& packing) {
    const Buffer<Row> rows = sorted<Row>(packing);
    const Buffer<std::uint8_t> prefixes = buffer<std::uint8_t>();
    const std::vector<Counts> starts = compare_neighbours(rows, packing, prefixes);
    report(0.75);
    const TrieShape shape = shape_of(starts.back());
    TrieBlock out(shape);
    out.zero_bits();
    first_node_ = shape.first_node;
    copy_tables(out);
    if (shape.wide())
      wide_items_ ? emit<std::uint32_t, std::int64_t>(rows, packing, prefixes, starts, out)
                  : emit<std::uint32_t, std::int32_t>(rows, packing, prefixes, starts, out);
    else
      wide_items_ ? emit<std::uint16_t, std::int64_t>(rows, packing, prefixes, starts, out)
                  : emit<std::uint16_t, std::int32_t>(rows, packing, prefixes, starts, out);
    TrieBytes bytes = out.finish(threads_);
    report(1.0);
    return bytes;
  }

  void report(double share) {
    interrupt_.check();
    if (in_.progress) in_.progress(share);
  }

  template <typename Body>
  void for_rows(const Body& body) {
    interrupt_.for_rows(0, 0, n_, body);
    interrupt_.check();
  }

  // One element per row.
  template <typename Element>
  Buffer<Element> buffer() const {
    Buffer<Element> elements(n_);
    advise_huge_pages(elements.get(), n_ * sizeof(Element));
    return elements;
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
    levels_ = static_cast<int>(longest) + sids_.eos();
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
          most[l] = std::max(most[l], static_cast<std::uint64_t>(sids_.code(row, l)));
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
      for (int l = 0; l < columns && l < sids_.length_of(row) - sids_.eos(); ++l)
        if (sids_.symbol(row, l) < 0)
          refuse("sids[", row, ", ", l, "] = ", +sids_.code(row, l), " has no token in vocab.token_ids[", l, "]");
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
      if (read && static_cast<std::uint64_t>(sids_.code(row, level)) >= limit)
        refuse("sids[", row, ", ", level, "] = ", +sids_.code(row, level), " is outside [0, ", limit, ")");
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
    const int row_bits = bit_width(n_ - 1), id_bits = bit_width(most);
    id_bits + row_bits <= 64 ? check_distinct<std::uint64_t>(row_bits, id_bits)
                             : check_distinct<Wide>(row_bits, id_bits);
  }

  template <typename Row>
  void check_distinct(int row_bits, int id_bits) {
    const Buffer<Row> rows = buffer<Row>(), spare = buffer<Row>();
    parallel_shares(threads_, n_, [&](int t, std::int64_t begin, std::int64_t end) {
      interrupt_.for_rows(t, begin, end, [&](std::int64_t row) {
        spare[row] = Row(in_.item_ids[row]) << row_bits | static_cast<std::uint64_t>(row);
      });
    });
    RadixSort<Row>(rows.get(), spare.get(), row_bits, threads_, interrupt_).sort(n_, row_bits + id_bits, true);
    const auto row_of = [&](std::int64_t i) { return static_cast<std::int64_t>(rows[i] & ((Row(1) << row_bits) - 1)); };
    for (std::int64_t i = 1; i < n_; ++i)
      if (rows[i] >> row_bits == rows[i - 1] >> row_bits)
        refuse("item_ids[", row_of(i - 1), "] and item_ids[", row_of(i), "] are both ", in_.item_ids[row_of(i)]);
  }

  // All rows in order, with the symbols of word 0.
  template <typename Row>
  Buffer<Row> sorted(const Packing& p) {
    Buffer<Row> rows = buffer<Row>();
    const Buffer<Row> spare = buffer<Row>();
    parallel_shares(threads_, n_, [&](int t, std::int64_t begin, std::int64_t end) {
      interrupt_.for_rows(t, begin, end, [&](std::int64_t row) { spare[row] = sids_.template packed<Row>(row, p, 0); });
    });
    interrupt_.check();
    report(0.3);
    typename RadixSort<Row>::Ties ties;
    if (p.words > 1)
      ties = [&](RadixSort<Row>& sort, int t, std::int64_t begin, std::int64_t end, int word) {
        if (word + 1 == p.words) return;
        const Row key = rows[begin] >> p.row_bits << p.row_bits;
        for (std::int64_t i = begin; i < end; ++i) rows[i] = sids_.template packed<Row>(p.row_of(rows[i]), p, word + 1);
        sort.sort_piece(t, {begin, end, p.row_bits + p.used[word + 1], false}, word + 1);
        if (word == 0)
          for (std::int64_t i = begin; i < end; ++i) rows[i] = key | static_cast<std::uint64_t>(p.row_of(rows[i]));
      };
    RadixSort<Row>(rows.get(), spare.get(), p.row_bits, threads_, interrupt_, ties)
        .sort(n_, p.row_bits + p.used[0], true);
    report(0.7);
    return rows;
  }

  // Fills prefixes; returns the counts before each thread's share and, last, the total.
  template <typename Row>
  std::vector<Counts> compare_neighbours(const Buffer<Row>& rows, const Packing& p,
                                         const Buffer<std::uint8_t>& prefixes) {
    const int word_levels = p.first_level[1];
    std::array<std::uint8_t, 129> level_of_width{};  // level of the highest differing bit in word 0
    for (int l = 0; l < word_levels; ++l)
      for (int bit = p.shift[l]; bit < p.shift[l] + p.bits[l]; ++bit)
        level_of_width[bit + 1] = static_cast<std::uint8_t>(l);
    std::vector<Counts> counts(threads_ + 1);
    std::vector<std::int64_t> prefix_of_next(threads_, -1);
    parallel_shares(threads_, n_, [&](int t, std::int64_t begin, std::int64_t end) {
      Counts& c = counts[t + 1];
      Depths opened{}, closed{};  // numbers of distinct rows by common prefix, and by length
      interrupt_.for_rows(t, begin, end, [&](std::int64_t i) {
        const std::int64_t row = p.row_of(rows[i]);
        const int length = sids_.length_of(row);
        int prefix = 0;
        if (i) {
          const Row difference = rows[i] ^ rows[i - 1];
          const std::int64_t previous = p.row_of(rows[i - 1]);
          if (difference >> p.row_bits) {
            prefix = level_of_width[bit_width(difference)];
          } else {
            prefix = word_levels;
            while (prefix < levels_ && sids_.symbol(row, prefix) == sids_.symbol(previous, prefix)) ++prefix;
          }
          if (prefix >= length) {
            prefixes[i] = kRepeat;
            ++c.items[length];
            return;
          }
          if (prefix == sids_.length_of(previous) && prefix_of_next[t] < 0) prefix_of_next[t] = i - 1;
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
      if (i >= 0) refuse_prefix(p.row_of(rows[i]), p.row_of(rows[i + 1]));
    for (int t = 0; t < threads_; ++t)
      for (int d = 0; d <= levels_; ++d) {
        counts[t + 1].nodes[d] += counts[t].nodes[d];
        counts[t + 1].items[d] += counts[t].items[d];
      }
    return counts;
  }

  [[noreturn]] void refuse_prefix(std::int64_t row, std::int64_t next) const {
    refuse("sids[", row, "] = ", sids_.show(row), " is a proper prefix of sids[", next, "] = ", sids_.show(next),
           "; a vocab with eos tells them apart");
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

  template <typename Symbol, typename Item, typename Row>
  void emit(const Buffer<Row>& rows, const Packing& p, const Buffer<std::uint8_t>& prefixes,
            const std::vector<Counts>& starts, const TrieBlock& out) {
    using Writer = NodeWriter<Symbol, Item>;
    std::atomic<std::int64_t> distinct{0};
    out.section<Symbol>(kSymbols)[0] = 0;
    parallel_shares(threads_, n_, [&](int t, std::int64_t begin, std::int64_t end) {
      Writer writer(out, first_node_, first_item_, starts[t]);
      for (; begin < end && !interrupt_.stopped(t); begin += Writer::kStretch) {
        const int count = static_cast<int>(std::min<std::int64_t>(Writer::kStretch, end - begin));
        const std::uint8_t* shared = prefixes.get() + begin;
        writer.write(sids_, p, rows.get() + begin, shared, count, levels_);
        distinct += count - std::count(shared, shared + count, kRepeat);
      }
      writer.flush();
    });
    interrupt_.check();
    out.header()[kNumSids] = distinct;
  }

  const TrieBuildInput& in_;
  const SidRows<T> sids_;
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
