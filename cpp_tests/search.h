#pragma once
// beam_step of one query on raw pointers, and what it is to give, worked out candidate by candidate.
#include <algorithm>
#include <cmath>
#include <vector>

#include "beam_search/beam_search.h"
#include "beam_search/beam_search_math.h"
#include "common/isa.h"
#include "logits.h"

// A query's beams before a step and the step's options; `args` points into the rest.
struct Step {
  std::vector<float> scores, lse;
  std::vector<std::int64_t> nodes;
  Logits logits;
  raddpo::BeamStepArgs args{};

  Step(const raddpo::TrieView& trie, std::vector<float> beam_scores, std::vector<std::int64_t> beam_nodes, Logits rows,
       std::int64_t columns, std::int64_t beam_width)
      : scores(std::move(beam_scores)), nodes(std::move(beam_nodes)), logits(std::move(rows)) {
    args.trie = trie;
    args.logits = logits.memory.get();
    args.logit_type = logits.type;
    args.batch = 1;
    args.width = static_cast<std::int64_t>(nodes.size());
    args.vocab = args.stride_beam = columns;
    args.stride_batch = args.width * columns;
    args.scores = scores.data();
    args.nodes = nodes.data();
    args.level = -1;
    args.beam_width = beam_width;
    set_length_penalty(0);
  }
  Step(const Step&) = delete;

  void set_length_penalty(double penalty) {
    for (int d = 0; d <= args.trie.levels; ++d)
      args.length_factor[d] = static_cast<float>(std::pow(std::max(d, 1), penalty));
  }
  void set_lse(float value) {
    lse.assign(nodes.size(), value);
    args.lse = lse.data();
  }
};

// Lists with room for so many candidates more than are kept, the beams in two pieces.
inline std::vector<raddpo::Candidate> run(const Step& step, std::int64_t room, std::int64_t split) {
  const raddpo::BeamStepArgs& a = step.args;
  const std::int64_t capacity = a.beam_width + room;
  const std::unique_ptr<raddpo::Candidate[]> list(new raddpo::Candidate[capacity]);
  const std::unique_ptr<float[]> keys(new float[capacity]);
  raddpo::Best best{list.get(), keys.get(), 0, a.beam_width, capacity, -INFINITY};
  RADDPO_CALL_ISA(beam_step, a, 0, 0, split, best);
  RADDPO_CALL_ISA(beam_step, a, 0, split, a.width, best);
  raddpo::trim(best);
  raddpo::sort(best);
  return {list.get(), list.get() + best.count};
}

// The columns that the log-sum-exp of a beam at `level` runs over.
inline std::vector<double> support(const Step& step, std::int64_t slot, int level) {
  const raddpo::BeamStepArgs& a = step.args;
  const float* row = step.logits.values.data() + slot * a.vocab;
  std::vector<double> x;
  if (a.normalize == raddpo::Normalize::vocab) return {row, row + a.vocab};
  if (a.normalize == raddpo::Normalize::level) {
    for (std::int64_t s = 0; s < a.trie.num_symbols[level]; ++s) x.push_back(row[raddpo::column_of(a, level, s)]);
    return x;
  }
  const raddpo::Range children = raddpo::children_of(a.trie, step.nodes[slot]);
  for (std::int64_t child = children.first; child < children.first + children.count; ++child)
    if (raddpo::is_live(a.trie.live_nodes, child))
      x.push_back(row[raddpo::column_of(a, level, raddpo::symbol_of(a.trie, child))]);
  return x;
}

// All candidates, best first and those of equal keys by parent, then token. In float, with log-sum-exps in double.
inline std::vector<raddpo::Candidate> brute_force(const Step& step) {
  const raddpo::BeamStepArgs& a = step.args;
  std::vector<raddpo::Candidate> all;
  for (std::int64_t slot = 0; slot < a.width; ++slot) {
    const std::int64_t node = step.nodes[slot];
    const float score = step.scores[slot];
    if (!raddpo::is_node(a.trie, node) || !(score > -INFINITY)) continue;
    const int level = raddpo::depth_of(a.trie, node);
    const raddpo::Range children = raddpo::children_of(a.trie, node);
    const auto parent = static_cast<std::int32_t>(slot);
    if (!children.count) {
      all.push_back({score / a.length_factor[level], score, parent, -1, node});
      continue;
    }
    if (!raddpo::has_columns(a, level)) continue;
    const auto lse = static_cast<float>(a.lse ? a.lse[slot] : log_sum_exp(support(step, slot, level)));
    for (std::int64_t child = children.first; child < children.first + children.count; ++child) {
      if (!raddpo::is_live(a.trie.live_nodes, child)) continue;
      const std::int64_t symbol = raddpo::symbol_of(a.trie, child);
      const float logp = step.logits.values[slot * a.vocab + raddpo::column_of(a, level, symbol)] - lse;
      const float sum = score + (logp > 0.f ? 0.f : logp);
      if (sum > -INFINITY)
        all.push_back({sum / a.length_factor[level + 1], sum, parent, raddpo::token_of(a.trie, level, symbol), child});
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const auto& x, const auto& y) { return x.key > y.key; });
  return all;
}
