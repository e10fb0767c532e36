// beam_step for every instruction set and type of logits, against all candidates in order.
#include "catalogue.h"
#include "check.h"
#include "search.h"
#include "trie_index/trie_live.h"

using namespace raddpo;

namespace {

struct Case {
  Random random;
  Catalogue catalogue;
  TrieBytes trie;
  TrieLive live;
  TrieView view;

  explicit Case(int seed) : random(seed), catalogue(Catalogue::random(random, seed % 2 ? 40 : 600, seed % 3 ? 60 : 8)) {
    trie = catalogue.build();
    std::vector<std::int64_t> kept;
    for (std::int64_t item : catalogue.items)
      if (random.chance(0.7)) kept.push_back(item);
    live =
        trie_live({trie.data.get(), nullptr, kept.data(), static_cast<std::int64_t>(kept.size()), nullptr, 0, true, 1});
    view = view_of(trie, seed % 4 == 0 ? live.bytes.data.get() : nullptr);
  }

  // Inner nodes, whole SIDs, numbers that are no nodes, and empty slots.
  std::vector<std::int64_t> some_nodes(std::int64_t width) {
    std::vector<std::int64_t> nodes(width);
    for (std::int64_t& node : nodes) node = random.chance(0.2) ? 0 : random.between(-2, num_nodes_of(view) + 1);
    return nodes;
  }
  std::vector<float> some_scores(std::int64_t width) {
    std::vector<float> scores(width);
    for (float& score : scores)
      score = random.chance(0.1) ? -INFINITY : random.chance(0.05) ? NAN : -0.5f * static_cast<float>(random.below(9));
    return scores;
  }
};

bool same(const Candidate& a, const Candidate& b) {
  return a.key == b.key && a.score == b.score && a.parent == b.parent && a.token == b.token && a.node == b.node;
}

void check_exact(const Step& step, Random& random) {
  std::vector<Candidate> expected = brute_force(step);
  if (static_cast<std::int64_t>(expected.size()) > step.args.beam_width) expected.resize(step.args.beam_width);
  const std::vector<Candidate> got = run(step, 1 + random.below(6), random.between(0, step.args.width));
  CHECK_EQUAL(got.size(), expected.size());
  for (std::size_t i = 0; i < got.size(); ++i) CHECK(same(got[i], expected[i]));
}

// Log-probs without rounding, so that candidates tie often: the last column, no child's, is the log-sum-exp.
TEST(beam_step_is_exact_to_the_last_tie) {
  for_each_isa([] {
    for (int seed = 0; seed < 120; ++seed) {
      Case c(seed);
      const std::int64_t width = c.random.between(1, 20), tokens = c.catalogue.num_tokens();
      const std::int64_t columns = c.random.chance(0.2) ? 1 + tokens / 2 : tokens + 1;  // some levels lack theirs
      std::vector<float> rows(width * columns);
      for (std::int64_t i = 0; i < width * columns; ++i)
        rows[i] = i % columns == columns - 1 ? 200.f : 0.5f * static_cast<float>(c.random.between(-3, 3));
      if (c.random.chance(0.3)) rows[c.random.below(width * columns)] = c.random.chance(0.5) ? NAN : -INFINITY;
      Step step(c.view, c.some_scores(width), c.some_nodes(width), Logits(kLogitTypes[seed % 3], rows), columns,
                c.random.between(1, 50));
      step.set_length_penalty(seed % 5 ? 0 : 0.7);
      check_exact(step, c.random);
    }
  });
}

// The logits of one level's symbols, with their log-sum-exp given: what linear_beam_step hands over.
TEST(beam_step_of_one_level) {
  for_each_isa([] {
    for (int seed = 0; seed < 60; ++seed) {
      Case c(seed);
      const auto level = static_cast<int>(c.random.below(c.view.levels));
      const std::int64_t width = c.random.between(1, 20), columns = c.view.num_symbols[level];
      std::vector<float> rows(width * columns);
      for (float& x : rows) x = 0.5f * static_cast<float>(c.random.between(-3, 3));
      Step step(c.view, c.some_scores(width), c.some_nodes(width), Logits(kLogitTypes[seed % 3], rows), columns,
                c.random.between(1, 50));
      step.args.level = level;
      step.set_lse(200.f);
      // Beams of other levels are not extended.
      for (std::int64_t& node : step.nodes)
        if (is_node(c.view, node) && children_of(c.view, node).count && depth_of(c.view, node) != level) node = -1;
      check_exact(step, c.random);
    }
  });
}

// Whatever the support: each score to rounding, and none left out that is better by more than that.
TEST(beam_step_normalizes_over_each_support) {
  for_each_isa([] {
    for (int seed = 0; seed < 60; ++seed)
      for (Normalize normalize : {Normalize::vocab, Normalize::level, Normalize::trie}) {
        Case c(seed);
        const std::int64_t width = c.random.between(1, 20), columns = c.catalogue.num_tokens();
        std::vector<float> rows(width * columns);
        for (float& x : rows) x = static_cast<float>(c.random.below(1 << 20)) / (1 << 17) - 4.f;
        Step step(c.view, c.some_scores(width), c.some_nodes(width), Logits(kLogitTypes[seed % 3], rows), columns,
                  c.random.between(1, 50));
        step.args.normalize = normalize;
        const std::vector<Candidate> expected = brute_force(step);
        const std::vector<Candidate> got = run(step, 256, 0);
        CHECK_EQUAL(got.size(), std::min<std::size_t>(expected.size(), step.args.beam_width));
        for (std::size_t i = 0; i < got.size(); ++i) {
          CHECK(std::fabs(got[i].score - expected[i].score) < 1e-4f);
          const auto it = std::find_if(expected.begin(), expected.end(), [&](const Candidate& other) {
            return other.node == got[i].node && other.parent == got[i].parent && other.token == got[i].token;
          });
          CHECK(it != expected.end() && std::fabs(it->score - got[i].score) < 1e-4f);
        }
      }
  });
}

}  // namespace
