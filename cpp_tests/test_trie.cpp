// Tries built, thinned, packed and merged, against a map from token sequences to items; and to the byte against a build
// of what should be there.
#include <algorithm>
#include <set>

#include "catalogue.h"
#include "check.h"
#include "trie/trie_ops.h"
#include "trie_index/trie_check.h"
#include "trie_index/trie_live.h"
#include "trie_index/trie_merge.h"

using namespace raddpo;

namespace {

constexpr int kCatalogues = 60;

Sid walk(const TrieView& trie, const Sid& tokens) {
  Sid nodes(tokens.size() + 1, 777);
  trie_walk_row({trie, tokens.data(), 1, static_cast<std::int64_t>(tokens.size()), nodes.data()}, 0);
  return nodes;
}

std::vector<std::int64_t> items_of_leaf(const TrieView& trie, const std::int64_t* header, std::int64_t node) {
  std::int64_t first = 777, count = 777;
  trie_range({trie, &node, 1, true, &first, &count}, 0);
  std::vector<std::int64_t> items;
  for (std::int64_t place = first; place < first + count; ++place) {
    std::int64_t number = 777;
    trie_select({trie.live_items, header[kNumItems], &place, 1, &number}, 0);
    const auto* ids = reinterpret_cast<const std::uint8_t*>(header) + header[kItems];
    items.push_back(header[kItemBytes] == 8 ? reinterpret_cast<const std::int64_t*>(ids)[number]
                                            : reinterpret_cast<const std::int32_t*>(ids)[number]);
  }
  return items;
}

// Every lookup gives what the catalogue's map does.
void check_lookups(const Catalogue& c, const TrieBytes& trie, const std::uint8_t* live) {
  const TrieView view = view_of(trie, live);
  const std::int64_t* header = header_of(trie.data.get());
  const auto expected = c.by_tokens();
  const std::int64_t num_tokens = c.num_tokens();
  std::set<Sid> prefixes{{}};
  std::map<Sid, std::set<std::int64_t>> children;
  for (const auto& [path, items] : expected) {
    const std::int64_t leaf = walk(view, path).back();
    CHECK(leaf > 0);
    CHECK(items_of_leaf(view, header, leaf) == items);
    std::vector<std::int64_t> codes(view.sid_levels, 777);
    std::int64_t depth = 777;
    trie_path({view, &leaf, 1, codes.data(), &depth}, 0);
    CHECK_EQUAL(depth, static_cast<std::int64_t>(path.size()));
    for (int l = 0; l < view.sid_levels; ++l) {
      const bool within = l < static_cast<int>(path.size()) && path[l] != c.eos;
      const std::int64_t code = codes[l];
      CHECK(within ? (c.vocab == Vocab::none ? code : c.tokens[l][code]) == path[l] : code == -1);
    }
    for (std::size_t depth_of_prefix = 0; depth_of_prefix < path.size(); ++depth_of_prefix) {
      const Sid prefix(path.begin(), path.begin() + depth_of_prefix);
      prefixes.insert(prefix);
      children[prefix].insert(path[depth_of_prefix]);
    }
    prefixes.insert(path);
  }
  for (const auto& [prefix, tokens] : children) {
    const std::int64_t node = walk(view, prefix).back();
    std::int64_t first = 777, count = 777;
    trie_range({view, &node, 1, false, &first, &count}, 0);
    CHECK_EQUAL(count, static_cast<std::int64_t>(tokens.size()));
    std::int64_t place = first;
    for (std::int64_t token : tokens) {  // ascending
      const std::int64_t child = node_at(view, place++);
      CHECK_EQUAL(token_of(view, static_cast<int>(prefix.size()), symbol_of(view, child)), token);
      CHECK_EQUAL(parent_of(view, child, depth_of(view, child)), node);
    }
    Sid wrong = prefix;
    for (std::int64_t token = -1; token < num_tokens + 2; ++token) {
      wrong.push_back(token);
      CHECK_EQUAL(walk(view, wrong).back() >= 0, tokens.count(token) > 0);
      wrong.pop_back();
    }
  }
  CHECK_EQUAL(live_before(view.live_nodes, num_nodes_of(view)), static_cast<std::int64_t>(prefixes.size()));
}

TEST(trie_build_matches_a_map) {
  for (int seed = 0; seed < kCatalogues; ++seed) {
    Random random(seed);
    const Catalogue c = Catalogue::random(random, seed % 2 ? 30 : 400, seed % 3 ? 30 : 4);
    const TrieBytes trie = c.build();
    CHECK_EQUAL(trie_checksum(trie.data.get(), trie.size),
                static_cast<std::uint64_t>(header_of(trie.data.get())[kChecksum]));
    CHECK_EQUAL(header_of(trie.data.get())[kNumSids], static_cast<std::int64_t>(c.by_tokens().size()));
    check_lookups(c, trie, nullptr);
    trie_check(trie.data.get(), trie.size, 1 + seed % 3);
    for (int threads : {2, 3})
      for (int bytes : {1, 2, 4, 8})
        for (bool is_signed : {false, true}) CHECK(equal(c.build(threads, bytes, is_signed), trie));
  }
}

struct Thinned {
  Catalogue kept, gone;
};

Thinned thin(Random& random, const Catalogue& c, double share) {
  Thinned out{c.without_rows(), c.without_rows()};
  for (std::size_t row = 0; row < c.sids.size(); ++row) (random.chance(share) ? out.kept : out.gone).add(c, row);
  return out;
}

TrieLive live_of_ids(const TrieBytes& trie, const std::uint8_t* before, const std::vector<std::int64_t>& ids, bool keep,
                     int threads) {
  return trie_live(
      {trie.data.get(), before, ids.data(), static_cast<std::int64_t>(ids.size()), nullptr, 0, keep, threads});
}

TEST(trie_live_matches_a_map) {
  for_each_isa([] {
    for (int seed = 0; seed < kCatalogues; ++seed) {
      Random random(seed);
      const Catalogue c = Catalogue::random(random, seed % 2 ? 30 : 400, seed % 3 ? 30 : 4);
      const TrieBytes trie = c.build();
      const auto [once, first_gone] = thin(random, c, 0.7);
      const auto [twice, then_gone] = thin(random, once, 0.6);
      const int threads = 1 + seed % 3;
      std::vector<std::int64_t> wanted = once.items;
      if (seed % 2) wanted.push_back(std::int64_t(1) << 41);  // an id that the trie lacks
      const TrieLive kept = live_of_ids(trie, nullptr, wanted, true, threads);
      const TrieLive left = live_of_ids(trie, nullptr, first_gone.items, false, threads);
      CHECK(equal(kept.bytes, left.bytes));
      const TrieLive again = live_of_ids(trie, kept.bytes.data.get(), then_gone.items, false, threads);
      check_lookups(twice, trie, again.bytes.data.get());
      CHECK_EQUAL(again.items, static_cast<std::int64_t>(twice.items.size()));
      CHECK_EQUAL(again.sids, static_cast<std::int64_t>(twice.by_tokens().size()));
      if (!then_gone.items.empty())
        CHECK_REFUSED(live_of_ids(trie, again.bytes.data.get(), then_gone.items, false, threads),
                      "no item of the index");

      if (header_of(trie.data.get())[kItemBytes] == 4) {
        const std::int64_t size = *std::max_element(c.items.begin(), c.items.end()) + 1;
        const std::unique_ptr<bool[]> mask(new bool[size]());
        for (std::int64_t id : once.items) mask[id] = true;
        const TrieLive masked = trie_live({trie.data.get(), nullptr, nullptr, 0, mask.get(), size, false, threads});
        CHECK(equal(masked.bytes, kept.bytes));
        CHECK_REFUSED(trie_live({trie.data.get(), nullptr, nullptr, 0, mask.get(), size - 1, false, threads}),
                      "but the index holds item");
      }
      if (!twice.items.empty())
        CHECK(equal(trie_compact(trie.data.get(), again.bytes.data.get(), again.sids, threads), twice.build()));
    }
  });
}

TEST(trie_merge_is_a_build_of_both) {
  for (int seed = 0; seed < kCatalogues; ++seed) {
    Random random(seed);
    const Catalogue c = Catalogue::random(random, seed % 2 ? 30 : 400, seed % 3 ? 30 : 4);
    const auto [old, added] = thin(random, c, 0.8);
    if (old.items.empty() || added.items.empty()) continue;
    const TrieBytes a = old.build(), b = added.build();
    Catalogue both = old;
    for (std::size_t row = 0; row < added.sids.size(); ++row) both.add(added, row);
    for (int threads : {1, 2, 3}) CHECK(equal(trie_merge(a.data.get(), b.data.get(), threads), both.build()));
    const auto count = static_cast<std::int64_t>(added.items.size());
    CHECK_EQUAL(first_known(a.data.get(), added.items.data(), count, 1 + seed % 2), -1);
    CHECK_EQUAL(first_known(b.data.get(), added.items.data(), count, 1), added.items[0]);
  }
}

// 17 bits a symbol, several words a SID, and more nodes than one block of ranks or hints.
TEST(trie_of_wide_symbols_and_long_sids) {
  Random random(0);
  for (bool long_sids : {false, true}) {
    Catalogue c;
    c.columns = long_sids ? 9 : 2;
    for (int row = 0; row < 1500; ++row) {
      Sid sid(c.columns);
      for (std::int64_t& code : sid) code = random.below(long_sids ? 600 : 100'000);
      c.sids.push_back(sid);
      c.items.push_back(row);
    }
    const TrieBytes trie = c.build(2);
    const TrieView view = view_of(trie);
    CHECK_EQUAL(view.wide, long_sids ? 0 : 1);
    for (const auto& [path, items] : c.by_tokens())
      CHECK(items_of_leaf(view, header_of(trie.data.get()), walk(view, path).back()) == items);
    const auto [kept, gone] = thin(random, c, 0.5);
    const TrieLive live = live_of_ids(trie, nullptr, gone.items, false, 2);
    const TrieBytes packed = trie_compact(trie.data.get(), live.bytes.data.get(), live.sids, 3);
    CHECK(equal(packed, kept.build()));
    CHECK_EQUAL(trie_merge(packed.data.get(), gone.build().data.get(), 3).size, trie.size);
  }
}

// Symbols of 17 bits at 30 levels: five words, in all of which rows are equal, few of them or many.
TEST(trie_of_sids_of_many_words) {
  Random random(0);
  for (int codes : {1, 2, 3}) {
    Catalogue c;
    c.columns = 30;
    for (int row = 0; row < 600; ++row) {
      Sid sid = random.chance(0.5) && row ? c.sids[random.below(row)] : Sid(c.columns);
      for (std::int64_t level = random.below(c.columns); level < c.columns; ++level)
        sid[level] = random.below(codes) * 60'000;
      c.sids.push_back(sid);
      c.items.push_back(row);
    }
    const TrieBytes trie = c.build(1);
    CHECK(equal(c.build(3), trie));
    trie_check(trie.data.get(), trie.size, 2);
    for (const auto& [path, items] : c.by_tokens())
      CHECK(items_of_leaf(view_of(trie), header_of(trie.data.get()), walk(view_of(trie), path).back()) == items);
  }
}

Catalogue plain(const std::vector<Sid>& sids, const std::vector<std::int64_t>& items) {
  Catalogue c;
  c.columns = static_cast<int>(sids[0].size());
  c.sids = sids;
  c.items = items;
  return c;
}

TEST(trie_refuses_bad_input) {
  CHECK_REFUSED(plain({{1, 2}, {1, 3}}, {4, 4}).build(), "item_ids[0] and item_ids[1] are both 4");
  CHECK_REFUSED(plain({{1, 2}}, {-1}).build(), "item_ids[0] = -1 is negative");
  CHECK_REFUSED(plain({{1, -2}}, {1}).build(), "sids[0, 1] = -2 is outside [0, 2147483647)");
  CHECK_REFUSED(plain({{1, std::int64_t(1) << 40}}, {1}).build(), "is outside [0, 2147483647)");
  Catalogue missing = plain({{0, 1}}, {1});
  missing.vocab = Vocab::table;
  missing.tokens = {{5}, {7}};
  CHECK_REFUSED(missing.build(), "sids[0, 1] = 1 is outside [0, 1)");
  const TrieBytes trie = plain({{1, 2}, {3, 4}}, {10, std::int64_t(1) << 50}).build();
  CHECK_REFUSED(live_of_ids(trie, nullptr, {11}, false, 1), "item_ids hold 11, which is no item of the index");
  CHECK_REFUSED(live_of_ids(trie, nullptr, {std::int64_t(1) << 51}, false, 1), "no item of the index");
}

}  // namespace
