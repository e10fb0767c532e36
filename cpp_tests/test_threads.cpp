// A catalogue that changes while it is searched: threads hold the version they started with, as Python's do by a
// reference to the index. Meant for ThreadSanitizer; every answer is checked too.
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>

#include "catalogue.h"
#include "check.h"
#include "search.h"
#include "trie/trie_ops.h"
#include "trie_index/trie_live.h"
#include "trie_index/trie_merge.h"

using namespace raddpo;

namespace {

// A block, which versions share, and what is left of it. Never changed once it is published.
struct Version {
  std::shared_ptr<const TrieBytes> block;
  std::shared_ptr<const TrieLive> live;  // null: all
  Catalogue left;
  std::vector<std::int64_t> best;  // the leaves that a search ends in

  TrieView view() const { return view_of(*block, live ? live->bytes.data.get() : nullptr); }
};

// A whole search with log-probs that are the same for all versions: -token.
std::vector<std::int64_t> search(const TrieView& trie, std::int64_t columns, std::int64_t beam_width) {
  std::vector<float> scores{0.f};
  std::vector<std::int64_t> nodes{0};
  for (int level = 0; level < trie.levels; ++level) {
    std::vector<float> rows(nodes.size() * columns);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = -static_cast<float>(i % columns);
    Step step(trie, scores, nodes, Logits(LogitType::float32, rows), columns, beam_width);
    step.set_lse(0.f);
    scores.clear();
    nodes.clear();
    for (const Candidate& c : run(step, 256, 0)) {
      scores.push_back(c.score);
      nodes.push_back(c.node);
    }
  }
  return nodes;
}

class Published {
 public:
  std::shared_ptr<const Version> get() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return version_;
  }
  void set(std::shared_ptr<const Version> version) {
    const std::lock_guard<std::mutex> lock(mutex_);
    version_ = std::move(version);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Version> version_;
};

constexpr std::int64_t kColumns = 40, kWidth = 10;

std::shared_ptr<const Version> version_of(std::shared_ptr<const TrieBytes> block, std::shared_ptr<const TrieLive> live,
                                          Catalogue left) {
  Version v{std::move(block), std::move(live), std::move(left), {}};
  v.best = search(v.view(), kColumns, kWidth);
  return std::make_shared<const Version>(std::move(v));
}

Catalogue shop(int rows) {
  Random random(0);
  Catalogue c;
  c.columns = 3;
  for (int row = 0; row < rows; ++row) {
    c.sids.push_back({random.below(20), random.below(20), random.below(kColumns)});
    c.items.push_back(row);
  }
  return c;
}

std::shared_ptr<const TrieBytes> shared(TrieBytes bytes) { return std::make_shared<const TrieBytes>(std::move(bytes)); }

std::shared_ptr<const TrieLive> discard(const Version& v, const std::vector<std::int64_t>& gone) {
  return std::make_shared<const TrieLive>(
      trie_live({v.block->data.get(), v.live ? v.live->bytes.data.get() : nullptr, gone.data(),
                 static_cast<std::int64_t>(gone.size()), nullptr, 0, false, 2}));
}

// Discards some items of the version at hand, and packs it and adds them again every third time.
std::shared_ptr<const Version> changed(const Version& v, Random& random, bool add) {
  Catalogue kept = v.left.without_rows(), gone = kept;
  for (std::size_t row = 0; row < v.left.sids.size(); ++row) (random.chance(0.9) ? kept : gone).add(v.left, row);
  if (gone.items.empty()) return version_of(v.block, v.live, v.left);
  auto live = discard(v, gone.items);
  if (!add) return version_of(v.block, live, kept);
  const TrieBytes packed = trie_compact(v.block->data.get(), live->bytes.data.get(), live->sids, 2);
  const TrieBytes added = gone.build(2);
  CHECK_EQUAL(first_known(packed.data.get(), gone.items.data(), static_cast<std::int64_t>(gone.items.size()), 2), -1);
  for (std::size_t row = 0; row < gone.sids.size(); ++row) kept.add(gone, row);
  return version_of(shared(trie_merge(packed.data.get(), added.data.get(), 2)), nullptr, kept);
}

TEST(threads_search_while_the_catalogue_changes) {
  Published published;
  const Catalogue all = shop(600);
  published.set(version_of(shared(all.build(2)), nullptr, all));
  std::atomic<bool> done{false};
  std::atomic<int> searches{0};
  std::vector<std::string> errors(4);
  const auto guarded = [&](int thread, const auto& body) {
    return std::thread([&, thread, body] {
      try {
        while (!done) body();
      } catch (const std::exception& error) {
        errors[thread] = error.what();
        done = true;
      }
    });
  };

  std::vector<std::thread> threads;
  for (int searcher : {0, 1})
    threads.push_back(guarded(searcher, [&] {
      const auto version = published.get();
      CHECK(search(version->view(), kColumns, kWidth) == version->best);
      ++searches;
    }));
  threads.push_back(guarded(2, [&] {  // looks up every SID
    const auto version = published.get();
    const TrieView trie = version->view();
    for (const Sid& sid : version->left.sids) {
      Sid nodes(sid.size() + 1);
      trie_walk_row({trie, sid.data(), 1, static_cast<std::int64_t>(sid.size()), nodes.data()}, 0);
      CHECK(nodes.back() > 0);
    }
  }));
  Random requests(1);
  threads.push_back(guarded(3, [&] {  // a filter of a request's own, on the shared block
    const auto version = published.get();
    Catalogue allowed = version->left.without_rows();
    std::vector<std::int64_t> gone;
    for (std::size_t row = 0; row < version->left.sids.size(); ++row)
      if (requests.chance(0.5))
        allowed.add(version->left, row);
      else
        gone.push_back(version->left.items[row]);
    const auto live = discard(*version, gone);
    CHECK_EQUAL(live->items, static_cast<std::int64_t>(allowed.items.size()));
    CHECK_EQUAL(live->sids, static_cast<std::int64_t>(allowed.by_tokens().size()));
    const auto found = search(view_of(*version->block, live->bytes.data.get()), kColumns, kWidth);
    CHECK(found.size() == std::min<std::size_t>(kWidth, allowed.by_tokens().size()));
  }));

  Random random(2);
  std::string error;
  try {
    for (int change = 1; !done && (change <= 200 || searches < 200); ++change) {
      if (change % 3 == 0) set_isa(static_cast<Isa>(random.below(static_cast<int>(best_isa()) + 1)));
      published.set(changed(*published.get(), random, change % 3 == 0));
      if (change % 50 == 0) published.set(version_of(shared(all.build(2)), nullptr, all));
    }
  } catch (const std::exception& caught) {
    error = caught.what();
  }
  done = true;
  for (std::thread& thread : threads) thread.join();
  set_isa(best_isa());
  for (const std::string& other : errors) error += other;
  if (!error.empty()) fail(__FILE__, __LINE__, error);
}

}  // namespace
