#pragma once
// Packing: the row of a session holds its prompt once and every candidate after it. Position q of a row attends to
// position k if and only if k <= q < ends[k]. In depth-first order a trie's nodes have their descendants right after
// them, so one number per position is enough in both layouts.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace raddpo {

struct PackInput {
  const std::int64_t* prompts;         // token ids, prompt after prompt
  const std::int64_t* prompt_begins;   // [sessions] where each one begins, after truncation
  const std::int64_t* prompt_lengths;  // [sessions] at least 1
  const std::int64_t* tokens;          // [candidates, levels]
  const std::int64_t* lengths;         // [candidates]
  const std::int64_t* offsets;         // [sessions + 1]
  std::int64_t sessions, candidates, levels;
  bool trie;        // equal prefixes within a session share their positions
  bool last_token;  // a candidate's last token has a position too
};

// The rows, concatenated. Columns count from the row's first token.
struct Pack {
  std::vector<std::int64_t> input_ids, position_ids, ends;
  std::vector<std::int64_t> row_begins;   // [sessions + 1]
  std::vector<std::int64_t> predictors;   // [candidates, levels] the column that predicts the token
  std::vector<std::int64_t> last_tokens;  // [candidates] the column of the last token
};

class Packer {
 public:
  explicit Packer(const PackInput& in) : in_(in) {}

  Pack run() {
    const std::int64_t candidates = in_.candidates;
    out_.predictors.resize(candidates * in_.levels);
    out_.last_tokens.resize(candidates);
    out_.row_begins.assign(1, 0);
    const std::int64_t guess =
        std::accumulate(in_.prompt_lengths, in_.prompt_lengths + in_.sessions, candidates * in_.levels);
    for (auto* column : {&out_.input_ids, &out_.position_ids, &out_.ends}) column->reserve(guess);
    for (std::int64_t s = 0; s < in_.sessions; ++s) pack(s);
    return std::move(out_);
  }

 private:
  void pack(std::int64_t s) {
    row_ = out_.row_begins.back();
    prompt_ = in_.prompt_lengths[s];
    for (std::int64_t i = 0; i < prompt_; ++i) put(in_.prompts[in_.prompt_begins[s] + i], i);
    order_.resize(in_.offsets[s + 1] - in_.offsets[s]);
    std::iota(order_.begin(), order_.end(), in_.offsets[s]);
    if (in_.trie) sort_candidates();
    for (const std::int64_t candidate : order_) place(candidate);
    close(0);
    for (std::int64_t i = 0; i < prompt_; ++i) out_.ends[row_ + i] = width();  // every candidate attends to the prompt
    out_.row_begins.push_back(row_ + width());
  }

  // Makes equal prefixes adjacent: the order of a depth-first walk of the session's trie.
  void sort_candidates() {
    std::stable_sort(order_.begin(), order_.end(), [&](std::int64_t a, std::int64_t b) {
      return std::lexicographical_compare(tokens(a), tokens(a) + in_.lengths[a], tokens(b), tokens(b) + in_.lengths[b]);
    });
  }

  // path_ holds the columns of the last candidate's tokens. In a trie, the next candidate reuses the shared ones.
  void place(std::int64_t candidate) {
    const std::int64_t length = in_.lengths[candidate];
    const auto kept = static_cast<std::size_t>(std::max<std::int64_t>(length - !in_.last_token, 0));
    const std::int64_t* token = tokens(candidate);
    std::size_t shared = 0;
    if (in_.trie)
      while (shared < kept && shared < path_.size() && out_.input_ids[row_ + path_[shared]] == token[shared]) ++shared;
    close(shared);
    for (std::size_t level = shared; level < kept; ++level) {
      path_.push_back(width());
      put(token[level], prompt_ + static_cast<std::int64_t>(level));
    }
    std::int64_t* predictor = out_.predictors.data() + candidate * in_.levels;
    for (std::int64_t level = 0; level < in_.levels; ++level)
      predictor[level] = level == 0 || level >= length ? prompt_ - 1 : path_[level - 1];
    out_.last_tokens[candidate] = kept == 0 ? prompt_ - 1 : path_[kept - 1];
  }

  // Ends the path's positions beyond `depth`: no later position attends to them.
  void close(std::size_t depth) {
    for (; path_.size() > depth; path_.pop_back()) out_.ends[row_ + path_.back()] = width();
  }

  void put(std::int64_t token, std::int64_t position) {
    out_.input_ids.push_back(token);
    out_.position_ids.push_back(position);
    out_.ends.push_back(0);
  }

  std::int64_t width() const { return static_cast<std::int64_t>(out_.input_ids.size()) - row_; }
  const std::int64_t* tokens(std::int64_t candidate) const { return in_.tokens + candidate * in_.levels; }

  const PackInput& in_;
  Pack out_;
  std::int64_t row_ = 0, prompt_ = 0;
  std::vector<std::int64_t> order_, path_;
};

}  // namespace raddpo
