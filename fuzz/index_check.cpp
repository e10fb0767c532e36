// libFuzzer: trie_check on any bytes. What passes must be a block that can be walked from end to end, that trie_build
// gives back to the byte, and that can be changed; all under AddressSanitizer and UndefinedBehaviorSanitizer.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../csrc/common/isa.h"
#include "../csrc/trie/trie_ops.h"
#include "../csrc/trie_index/trie_build.h"
#include "../csrc/trie_index/trie_check.h"
#include "../csrc/trie_index/trie_live.h"
#include "../csrc/trie_index/trie_merge.h"
#include "index_mutator.h"

using namespace raddpo;

namespace {

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken promise: %s\n", what);
  std::abort();
}

bool passes(const std::uint8_t* data, std::int64_t size, int threads) {
  try {
    trie_check(data, size, threads);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

struct Contents {
  std::vector<std::int64_t> sids, lengths, items;
};

// Every lookup at every node, and what the block holds.
Contents walk(const std::uint8_t* block) {
  const auto* h = reinterpret_cast<const std::int64_t*>(block);
  const TrieView t = view_of(block, h, nullptr);
  Contents out;
  std::int64_t next_child = 1, next_item = 0;
  std::vector<std::int64_t> codes(t.sid_levels);
  for (std::int64_t node = 0; node < h[kNumNodes]; ++node) {
    std::int64_t number = node, depth = -1;
    trie_path({t, &number, 1, codes.data(), &depth}, 0);
    const Range children = children_of(t, node), items = items_of(t, node);
    expect(children.first == next_child && items.first == next_item, "children and items are in order");
    next_child += children.count;
    next_item += items.count;
    expect(!children.count == (items.count > 0), "leaves have the items");
    expect(node == 0 || node == children_of(t, parent_of(t, node, depth)).first ||
               symbol_of(t, node - 1) < symbol_of(t, node),
           "siblings ascend");
    for (std::int64_t child = children.first; child < children.first + children.count; ++child) {
      const std::int32_t token = token_of(t, static_cast<int>(depth), symbol_of(t, child));
      expect(parent_of(t, child, depth + 1) == node && depth_of(t, child) == depth + 1, "a child's parent is its own");
      expect(find_child(t, node, static_cast<int>(depth), token) == child, "a child is found");
      expect(token <= h[kMaxToken + depth] && token >= 0, "tokens are at most max_token");
    }
    for (std::int64_t i = items.first; i < items.first + items.count; ++i) {
      const std::uint8_t* ids = block + h[kItems];
      out.items.push_back(h[kItemBytes] == 8 ? reinterpret_cast<const std::int64_t*>(ids)[i]
                                             : reinterpret_cast<const std::int32_t*>(ids)[i]);
      out.lengths.push_back(depth - (h[kEos] >= 0));
      out.sids.insert(out.sids.end(), codes.begin(), codes.end());
    }
  }
  expect(next_child == h[kNumNodes] && next_item == h[kNumItems], "every node is a child, every item a node's");
  return out;
}

// By the builder, or nothing where item ids repeat.
TrieBytes rebuilt(const std::uint8_t* block, const Contents& contents) {
  const auto* h = reinterpret_cast<const std::int64_t*>(block);
  TrieBuildInput input{};
  input.sids = contents.sids.data();
  input.sid_bytes = 8;
  input.sid_signed = true;
  input.rows = h[kNumItems];
  input.columns = h[kSidLevels];
  input.lengths = contents.lengths.data();
  input.item_ids = contents.items.data();
  input.eos = h[kEos];
  input.has_vocab = h[kHasVocab];
  for (int l = 0; l < h[kSidLevels] + (h[kEos] >= 0); ++l) {
    LevelSymbols level;
    level.first_token = static_cast<std::int32_t>(h[kFirstToken + l]);
    if (h[kHasVocab]) level.size = h[kSizes + l];
    if (h[kTable + l] >= 0) {
      const auto* tokens = reinterpret_cast<const std::int32_t*>(block + h[kTokens]) + h[kTable + l];
      const auto* codes = reinterpret_cast<const std::int32_t*>(block + h[kCodes]) + h[kTable + l];
      level.tokens.assign(tokens, tokens + h[kNumSymbols + l]);
      level.codes.assign(codes, codes + h[kNumSymbols + l]);
      level.symbol_of_code.assign(level.size, -1);
      for (std::size_t i = 0; i < level.codes.size(); ++i)
        (level.codes[i] < 0 ? level.eos_symbol : level.symbol_of_code[level.codes[i]]) = static_cast<std::int32_t>(i);
    }
    input.levels.push_back(level);
  }
  try {
    return trie_build(input);
  } catch (const std::invalid_argument& error) {
    expect(std::strstr(error.what(), "are both"), error.what());
    return {};
  }
}

// Half of the items go, and come back.
void change(const TrieBytes& whole, const std::vector<std::int64_t>& items) {
  std::vector<std::int64_t> half(items.begin(), items.begin() + items.size() / 2);
  const TrieBytes compact[2] = {
      [&] {
        const TrieLive left =
            trie_live({whole.data.get(), nullptr, half.data(), std::int64_t(half.size()), nullptr, 0, false, 1});
        return trie_compact(whole.data.get(), left.bytes.data.get(), left.sids, 2);
      }(),
      [&] {
        const TrieLive left =
            trie_live({whole.data.get(), nullptr, half.data(), std::int64_t(half.size()), nullptr, 0, true, 1});
        return trie_compact(whole.data.get(), left.bytes.data.get(), left.sids, 2);
      }()};
  for (const TrieBytes& part : compact) expect(passes(part.data.get(), part.size, 1), "what is left is an index");
  const TrieBytes merged = trie_merge(compact[0].data.get(), compact[1].data.get(), 2);
  expect(passes(merged.data.get(), merged.size, 2), "what is merged is an index");
  expect(walk(merged.data.get()).sids == walk(whole.data.get()).sids, "all SIDs are back");
}

}  // namespace

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most,
                                               unsigned int seed) {
  return Mutator(data, size, most, seed).mutate();
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  TrieBytes block{decltype(TrieBytes::data)(static_cast<std::uint8_t*>(std::malloc(size + !size))),
                  static_cast<std::int64_t>(size)};
  std::memcpy(block.data.get(), data, size);
  const unsigned choice = size ? data[size / 2] : 0;
  set_isa(choice % 3 ? best_isa() : Isa::scalar);
  if (size >= kHeaderWords * 8) sign(block.data.get(), size);
  if (!passes(block.data.get(), block.size, choice % 16 ? 1 : 3)) return 0;
  const Contents contents = walk(block.data.get());
  const TrieBytes again = rebuilt(block.data.get(), contents);
  if (!again.data) return 0;
  expect(again.size == block.size && !std::memcmp(again.data.get(), block.data.get(), size), "build gives the same");
  if (contents.items.size() > 1) change(block, contents.items);
  return 0;
}
