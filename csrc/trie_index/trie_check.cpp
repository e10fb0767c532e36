// Each step reads only what earlier steps have checked. The header comes first, before any pointer is formed from it:
// all its other words must follow from its counts.
#include "trie_check.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/buffer.h"
#include "../common/isa.h"
#include "../common/radix_sort.h"
#include "trie_block.h"
#include "trie_live.h"
#include "trie_math.h"

namespace raddpo {
namespace {

constexpr std::int64_t kBitsPerItem = 16;  // bits for the ids seen; hashing takes at most twice as many
constexpr std::int64_t kLargestToken = INT32_MAX - 1;

class Check {
 public:
  Check(const std::uint8_t* data, std::int64_t size, int threads)
      : data_(data), size_(size), threads_(threads), h_(reinterpret_cast<const std::int64_t*>(data)) {}

  void run() {
    file();
    counts();
    levels();
    header();
    view_ = view_of(data_, h_, nullptr);
    padding();
    tables();
    degrees(kChildBits, view_.children, 2 * nodes() - 1);
    degrees(kItemBits, view_.items, nodes() + h_[kNumItems]);
    depths();
    const Buffer<std::uint64_t> inner = zeros(view_.children);
    leaves(inner);
    symbols(inner);
    items();
  }

 private:
  std::int64_t nodes() const { return h_[kNumNodes]; }
  bool eos() const { return h_[kEos] >= 0; }

  void file() const {
    if (size_ < kHeaderWords * 8) refuse("not a TrieIndex file, or truncated: ", size_, " bytes");
    if (std::memcmp(data_, "RADTRIE", 8)) refuse("not a TrieIndex file");
    if (h_[kVersion] != kFormatVersion) refuse("format version ", h_[kVersion], ", this build reads ", kFormatVersion);
    if (h_[kBytes] != size_) refuse("truncated or altered: ", size_, " bytes where ", h_[kBytes], " were written");
    if (static_cast<std::uint64_t>(h_[kChecksum]) != trie_checksum(data_, size_))
      refuse("altered: its checksum does not match");
  }

  void within(int word, std::int64_t least, std::int64_t most) const {
    if (h_[word] < least || h_[word] > most)
      refuse("malformed: ", name_of_word(word), " is ", h_[word], ", outside [", least, ", ", most, "]");
  }
  void equal(int word, std::int64_t value) const {
    if (h_[word] != value) refuse("malformed: ", name_of_word(word), " is ", h_[word], ", not ", value);
  }

  void counts() const {
    within(kNumItems, 1, size_ / 4);
    within(kNumSids, 1, h_[kNumItems]);
    within(kNumNodes, 2, INT32_MAX);
    within(kHasVocab, 0, 1);
    within(kEos, -1, h_[kHasVocab] ? kLargestToken : -1);
    within(kSidLevels, 1, kMaxLevels - eos());
    within(kLevels, 1 + eos(), h_[kSidLevels] + eos());
    equal(kFirstNode, 0);
    equal(kFirstNode + 1, 1);
    for (int d = 2; d <= h_[kLevels] + 1; ++d) within(kFirstNode + d, h_[kFirstNode + d - 1] + 1, nodes());
    for (auto d = h_[kLevels] + 1; d < kMaxLevels + 2; ++d) equal(kFirstNode + static_cast<int>(d), nodes());
  }

  bool holds_eos(int level) const { return eos() && level > 0; }

  void levels() const {
    std::int64_t table = 0, codes = 0;
    for (int l = 0; l < kMaxLevels; ++l) {
      if (l >= h_[kSidLevels] + eos()) {
        for (int word : {kNumSymbols, kTable, kFirstToken, kSizes, kMaxToken}) equal(word + l, 0);
        continue;
      }
      if (l == h_[kSidLevels])
        equal(kSizes + l, 0);
      else
        within(kSizes + l, 1, h_[kHasVocab] ? kMaxCodes - codes : INT32_MAX);
      codes += h_[kSizes + l];
      if (h_[kTable + l] < 0) {
        equal(kTable + l, holds_eos(l) ? table : -1);
        equal(kNumSymbols + l, h_[kSizes + l]);
        within(kFirstToken + l, 0, h_[kHasVocab] ? kLargestToken - h_[kSizes + l] + 1 : 0);
        equal(kMaxToken + l, h_[kFirstToken + l] + h_[kSizes + l] - 1);
        if (h_[kEos] >= h_[kFirstToken + l] && h_[kEos] <= h_[kMaxToken + l])
          refuse("malformed: eos is ", h_[kEos], ", also the token of a code of level ", l);
      } else {
        equal(kTable + l, h_[kHasVocab] ? table : -1);
        within(kNumSymbols + l, 1 + (holds_eos(l) && l < h_[kSidLevels]), h_[kSizes + l] + holds_eos(l));
        equal(kFirstToken + l, 0);
        table += h_[kNumSymbols + l];
      }
    }
  }

  // The sections' offsets, the total size, and all other words that follow from the counts.
  void header() const {
    const TrieShape shape = TrieShape::of(data_);
    std::uint64_t expected[kHeaderWords];
    write_header(shape, TrieLayout(shape), expected);
    expected[kChecksum] = h_[kChecksum];
    for (int word = 0; word < kHeaderWords; ++word) equal(word, static_cast<std::int64_t>(expected[word]));
  }

  void padding() const {
    const TrieLayout layout(TrieShape::of(data_));
    for (int i = 0; i < TrieLayout::kSections; ++i)
      for (std::int64_t at = layout.begin[i] + layout.bytes[i]; at < layout.begin[i + 1]; ++at)
        if (data_[at]) refuse("malformed: not zero behind ", name_of_word(kSymbols + i));
  }

  void tables() const {
    for (int l = 0; l < h_[kSidLevels] + eos(); ++l) {
      if (view_.table[l] < 0) continue;
      const std::int32_t *tokens = view_.tokens + view_.table[l], *codes = view_.codes + view_.table[l];
      const std::int64_t count = h_[kNumSymbols + l], size = h_[kSizes + l];
      std::vector<bool> seen(size);
      bool ends = false, plain = count == size;
      for (std::int64_t i = 0; i < count; ++i) {
        if (tokens[i] < 0 || tokens[i] > kLargestToken || (i && tokens[i] <= tokens[i - 1]))
          refuse("malformed: the tokens of level ", l, " do not ascend from 0 to ", kLargestToken);
        const bool end = eos() && tokens[i] == h_[kEos];
        if (end ? codes[i] != -1 : codes[i] < 0 || codes[i] >= size || seen[codes[i]])
          refuse("malformed: codes of level ", l, " has ", codes[i], " for token ", tokens[i]);
        if (!end) seen[codes[i]] = true;
        ends |= end;
        plain &= codes[i] == i && tokens[i] - tokens[0] == i;
      }
      if (ends != holds_eos(l)) refuse("malformed: the tokens of level ", l, ends ? " hold" : " lack", " eos");
      if (plain) refuse("malformed: table[", l, "] is ", view_.table[l], " for codes that need none");
      equal(kMaxToken + l, tokens[count - 1]);
    }
  }

  // The bits have one zero per node and end in a zero; ranks and hints are those of the bits.
  void degrees(int word, const DegreeSequence& s, std::int64_t count) const {
    const auto bad = [&](int wrong) { refuse("malformed: ", name_of_word(wrong), " do not fit the bits"); };
    const std::int64_t blocks = (count + kBlockBits - 1) / kBlockBits;
    std::vector<char> follow(threads_);
    parallel_shares(threads_, blocks - 1, [&](int t, std::int64_t begin, std::int64_t end) {
      follow[t] = RADDPO_CALL_ISA(ranks_follow, s.bits, begin, end, s.ranks);
    });
    if (s.ranks[0] || std::count(follow.begin(), follow.end(), 0)) bad(word + 1);

    std::int64_t zeros = s.ranks[blocks - 1];
    bool clean = true;  // behind the last bit
    for (std::int64_t i = (blocks - 1) * kBlockBits; i < blocks * kBlockBits; ++i) {
      const bool one = s.bits[i / 64] >> (i % 64) & 1;
      zeros += !one && i < count;
      clean &= !one || i < count - 1;
    }
    if (zeros != nodes() || !clean)
      refuse("malformed: ", name_of_word(word), " hold ", zeros, " zeros for ", nodes(), " nodes, or do not end there");

    std::int64_t hint = 0;
    for (; hint * kHintZeros < nodes(); ++hint) {
      const std::int64_t block = s.hints[hint], zero = hint * kHintZeros;
      if (block >= blocks || s.ranks[block] > zero || zero >= (block + 1 < blocks ? s.ranks[block + 1] : nodes()))
        bad(word + 2);
    }
    if (s.hints[hint] != blocks - 1) bad(word + 2);
  }

  // The last node of each depth closes the children that are the whole next depth.
  void depths() const {
    for (int d = 0; d < h_[kLevels]; ++d) {  // the deepest nodes have no children left to check
      const std::int64_t* first = view_.first_node + d;
      if (select_zero(view_.children, first[1] - 1) != first[1] + first[2] - 2)
        refuse("malformed: the children of the nodes of depth ", d, " are not the nodes of depth ", d + 1);
    }
  }

  // One bit per node: whether it has ones in the sequence.
  Buffer<std::uint64_t> zeros(const DegreeSequence& s) const {
    return marks([&](std::int64_t begin, std::int64_t end, std::uint64_t* out) {
      const std::int64_t from = begin ? select_zero(s, begin - 1) + 1 : 0;
      RADDPO_CALL_ISA(mark_zeros, s.bits, from, select_zero(s, end - 1) + 1, out);
    });
  }

  // One bit per node: whether it is the root or a first child.
  Buffer<std::uint64_t> first_children() const {
    return marks([&](std::int64_t begin, std::int64_t end, std::uint64_t* out) {
      const DegreeSequence& s = view_.children;
      const std::int64_t last_block = (2 * nodes() - 2) / kBlockBits;
      const std::int64_t from = begin ? select_one(s, 0, last_block, begin - 1) : 0;
      RADDPO_CALL_ISA(mark_ones, s.bits, from, select_one(s, 0, last_block, end - 2) + 1, !begin, out);
    });
  }

  template <typename Mark>
  Buffer<std::uint64_t> marks(const Mark& mark) const {
    const std::int64_t words = (nodes() + 63) / 64;
    Buffer<std::uint64_t> out(words);
    parallel_shares(threads_, words, [&](int, std::int64_t begin, std::int64_t end) {
      std::fill(out.get() + begin, out.get() + end, 0);
      if (begin < end) mark(begin * 64, std::min(end * 64, nodes()), out.get() + begin);
    });
    return out;
  }

  // All leaves, and no other nodes, have items.
  void leaves(const Buffer<std::uint64_t>& inner) const {
    const Buffer<std::uint64_t> filled = zeros(view_.items);
    std::int64_t sids = 0;
    for (std::int64_t first = 0; first < nodes(); first += 64) {
      const std::uint64_t valid = nodes() - first < 64 ? (std::uint64_t(1) << (nodes() - first)) - 1 : ~0ull;
      if ((filled[first / 64] ^ inner[first / 64]) != valid)
        refuse("malformed: item_bits give items to a node with children, or none to a leaf");
      sids += popcount(filled[first / 64]);
    }
    equal(kNumSids, sids);
  }

  void symbols(const Buffer<std::uint64_t>& inner) const {
    if (symbol_of(view_, 0)) refuse("malformed: symbols has ", symbol_of(view_, 0), " for the root");
    const Buffer<std::uint64_t> first = first_children();
    for (int l = 0; l < h_[kLevels]; ++l) {
      const std::int64_t begin = view_.first_node[l + 1], size = view_.first_node[l + 2] - begin;
      std::int64_t end_symbol = eos() ? -1 : -2;
      if (holds_eos(l)) {
        const std::int32_t* tokens = view_.tokens + view_.table[l];
        end_symbol = std::lower_bound(tokens, tokens + view_.num_symbols[l], h_[kEos]) - tokens;
      }
      std::vector<SymbolsFound> found(threads_, {0, true, true});
      parallel_shares(threads_, size, [&](int t, std::int64_t from, std::int64_t to) {
        const SymbolCheck check{view_.symbols, view_.wide != 0, begin + from, begin + to,
                                first.get(),   inner.get(),     end_symbol};
        found[t] = RADDPO_CALL_ISA(check_symbols, check);
      });
      std::int64_t largest = 0;
      for (const SymbolsFound& part : found) {
        if (!part.ascend) refuse("malformed: symbols of level ", l, " do not ascend among siblings");
        if (!part.eos_ends) refuse("malformed: symbols of level ", l, " have eos elsewhere than at the leaves");
        largest = std::max(largest, part.largest);
      }
      if (largest >= h_[kNumSymbols + l])
        refuse("malformed: symbols of level ", l, " reach ", largest, ", num_symbols is ", h_[kNumSymbols + l]);
      if (!h_[kHasVocab]) equal(kSizes + l, largest + 1);
    }
    for (auto l = h_[kLevels]; !h_[kHasVocab] && l < h_[kSidLevels]; ++l) equal(kSizes + static_cast<int>(l), 1);
  }

  void items() const {
    const void* ids = data_ + h_[kItems];
    const std::int64_t count = h_[kNumItems];
    const bool wide = h_[kItemBytes] == 8;
    std::vector<IdsFound> found(threads_, {INT64_MAX, -1});
    parallel_shares(threads_, count, [&](int t, std::int64_t begin, std::int64_t end) {
      if (begin < end) found[t] = RADDPO_CALL_ISA(check_ids, ids, wide, begin, end);
    });
    IdsFound all = found[0];
    for (const IdsFound& part : found) all = {std::min(all.least, part.least), std::max(all.largest, part.largest)};
    if (all.least < 0) refuse("malformed: items hold ", all.least);
    if (wide != (all.largest > INT32_MAX)) refuse("malformed: item_bytes is ", h_[kItemBytes], " for ", all.largest);
    wide ? distinct(static_cast<const std::int64_t*>(ids), count, all.largest)
         : distinct(static_cast<const std::int32_t*>(ids), count, all.largest);
  }

  // One bit per id or, where ids are sparse, per hash. An id whose bit is already set is a repeat, or shares its hash
  // with another id: the few ids of such bits are sorted to tell.
  template <typename Id>
  static void distinct(const Id* ids, std::int64_t count, std::int64_t largest) {
    const bool dense = largest / kBitsPerItem < count;
    int width = 0;
    while (width < 40 && std::int64_t(1) << width < kBitsPerItem * count) ++width;
    const std::int64_t bits = dense ? largest + 1 : std::int64_t(1) << width;
    const auto place = [&](std::int64_t id) {
      return dense ? id : static_cast<std::int64_t>(slot_of(id) & (static_cast<std::uint64_t>(bits) - 1));
    };
    std::vector<std::uint64_t> seen((bits + 63) / 64), again(seen.size());
    bool any = false;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = place(ids[i]);
      const std::uint64_t bit = std::uint64_t(1) << (at % 64), before = seen[at / 64] & bit;
      again[at / 64] |= before;
      any |= before != 0;
      seen[at / 64] |= bit;
    }
    if (!any) return;
    std::vector<Id> suspects;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t at = place(ids[i]);
      if (again[at / 64] >> (at % 64) & 1) suspects.push_back(ids[i]);
    }
    std::sort(suspects.begin(), suspects.end());
    const auto twice = std::adjacent_find(suspects.begin(), suspects.end());
    if (twice != suspects.end()) refuse("malformed: items hold ", *twice, " twice");
  }

  const std::uint8_t* data_;
  std::int64_t size_;
  int threads_;
  const std::int64_t* h_;
  TrieView view_{};
};

}  // namespace

void trie_check(const std::uint8_t* data, std::int64_t size, int threads) { Check(data, size, threads).run(); }

}  // namespace raddpo
