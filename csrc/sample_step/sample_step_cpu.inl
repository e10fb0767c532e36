// One query's beams, in order. A beam's children are taken together: their log-probs, then their keys, which need the
// best of them. No perturbed score is above its parent's, so a beam below the threshold is passed over unread. Most
// children are passed over too: a product tells that their noise does not lift them above the threshold.
#include "../beam_search/live_beams.inl"
#include "../common/log_sum_exp.inl"
#include "child_sieve.inl"

namespace raddpo::RADDPO_ISA {
namespace {

constexpr int kFew = 16;  // children whose keys cost less than to tell which matter

// The children of one beam, whatever the type of its logits. Functions of a class are inline, but not visible outside.
struct Children : ChildSieve {
  const SampleStepArgs& a;
  const TrieView& t;
  Best& best;
  Noise noise;
  double* sums;          // [children] running sums of the probabilities, with replacement
  std::uint32_t* words;  // [children + 38] random bits of consecutive nodes, without; the memory of `sums`
  std::uint32_t* nodes;  // [children]
  LiveBeam beam{};
  std::int32_t slot = 0;
  ChildBatch batch;  // children of this beam and of some before it

  Children(const SampleStepArgs& args, std::int64_t query, Best& list, double* scratch)
      : a(args),
        t(args.trie),
        best(list),
        noise(static_cast<std::uint64_t>(*args.seed), static_cast<std::uint64_t>(args.keys[query])),
        sums(scratch),
        words(reinterpret_cast<std::uint32_t*>(scratch)),
        nodes(words + 2 * (args.symbols + 27)) {
    latest = reinterpret_cast<float*>(words + args.symbols + 38);
    logps = reinterpret_cast<float*>(nodes + args.symbols);
    keys = logps + args.symbols + kLanes;
  }

  void offer(std::int64_t i, float key) {
    if (key > best.threshold)
      push(best, {key, logps[i], slot, token_of(t, beam.level, symbol_of(t, nodes[i])), nodes[i]});
  }

  // Puts the batch's children among the best.
  void offer_batch() {
    int found = 0;
    for (int k = 0; k < batch.count; ++k) {  // without a branch, which would be taken as if at random
      hits[found] = k;
      found += batch.keys[k] > best.threshold;
    }
    for (int h = 0; h < found; ++h) {
      const int k = hits[h];
      const auto& owner = batch.beams[batch.owners[k]];
      const std::uint32_t node = batch.nodes[k];
      if (batch.keys[k] > best.threshold)
        push(best, {batch.keys[k], batch.logps[k], owner.slot, token_of(t, owner.level, symbol_of(t, node)), node});
    }
    batch.clear();
  }

  // Puts the children that wait among the best.
  void flush() {
    if (batch.count) {
      batch.perturb(noise);
      batch.condition();
    }
    offer_batch();
  }

  // The child that has its parent's perturbed score, and no sibling that matters.
  void offer_only(std::int64_t i, float parent) {
    if (!batch.count) return offer(i, parent);
    batch.open(beam, slot, parent);
    batch.add(nodes[i], logps[i]);
  }

  // e^x to 1e-5 relative, far less than the slack; infinite for a large x, and for NaN.
  static double rough_exp(float x) { return x < 80.f ? fast_exp(x) : INFINITY; }

  // No child whose key is above this gets a perturbed score above the threshold: T_c > t if e^-g_c < e^-t - e^-T +
  // e^-Z. `first` is at least e^(score - Z).
  float bar(float parent, double first, double slack) const {
    slack += 1e-6 * std::fabs(best.threshold);
    if (!(slack < 1)) return INFINITY;
    const double ours = rough_exp(beam.score - best.threshold);
    const double sum = ours - rough_exp(beam.score - parent) + first + slack * (ours + first);
    return sum == sum ? static_cast<float>(sum) : INFINITY;
  }

  // The hits alone, with scores of their own; returns the best.
  float perturb_hits(const std::uint32_t* bits, int count, float parent) {
    batch.clear();
    batch.open(beam, slot, parent);
    for (int k = 0; k < count; ++k) batch.add_drawn(nodes[hits[k]], logps[hits[k]], bits[hits[k]]);
    batch.perturb(noise);
    return batch.best_key();
  }

  // Puts the children among the best by their perturbed scores, at once or with those of the next beams. An only child
  // has its parent's, whatever its noise; the root, whose score is infinite, has none.
  void sample(std::int64_t n, float parent) {
    const bool is_root = parent == INFINITY;
    if (batch.is_full()) flush();
    if (n == 1 && !is_root) return offer_only(0, parent);
    if (n <= kFew && !is_root) {
      batch.open(beam, slot, parent);
      for (int i = 0; i < n; ++i) batch.add_undrawn(nodes[i], logps[i]);
      return;
    }
    const std::uint32_t* bits = noise.draw_words(nodes, n, words);
    const float soonest = weigh(bits, n);
    const double slack = 1e-4 + 1e-6 * (std::fabs(beam.score) + (is_root ? 0.f : std::fabs(parent)));
    const float last = is_root ? latest_of(a.beam_width, n, soonest) : soonest;
    const float reach = slack < 1 ? last * static_cast<float>(1 + slack) : INFINITY;
    if (n <= kBatch && !is_root) {  // the best child and all others that matter
      const float either = bar(parent, reach, slack);
      const int count = sieve(0, n, reach > either ? reach : either);
      if (count == 1) return offer_only(hits[0], parent);
      batch.open(beam, slot, parent);
      for (int k = 0; k < count; ++k) batch.add_drawn(nodes[hits[k]], logps[hits[k]], bits[hits[k]]);
      return;
    }
    flush();
    float most = is_root ? INFINITY : -INFINITY;
    const auto end = [n](std::int64_t first) { return first + kBatch < n ? first + kBatch : n; };
    for (std::int64_t first = 0; !is_root && first < n; first += kBatch) {
      const float best_of_hits = perturb_hits(bits, sieve(first, end(first), reach), parent);
      most = best_of_hits > most ? best_of_hits : most;
    }
    for (std::int64_t first = 0; first < n; first += kBatch) {
      const float above = bar(parent, rough_exp(beam.score - most), slack);
      perturb_hits(bits, sieve(first, end(first), is_root && reach < above ? reach : above), parent);
      if (!is_root) batch.condition(most);
      offer_batch();
    }
  }

  // How many of the beam's draws each child gets, by the inverse of the distribution function.
  void draw(std::int64_t n, std::int64_t draws) {
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      sum += logps[i] > -INFINITY ? fast_exp(logps[i]) : 0.f;
      sums[i] = sum;
      keys[i] = -INFINITY;
    }
    for (std::int64_t j = 0; j < draws; ++j) {
      const double at = (draw_noise(beam.node, j, noise.query_key, noise.seed) + 0.5) * 0x1p-32 * sum;
      std::int64_t low = 0, high = n - 1;  // the first child whose sum is above `at`
      while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (sums[middle] > at)
          high = middle;
        else
          low = middle + 1;
      }
      keys[low] = keys[low] > 0.f ? keys[low] + 1.f : 1.f;
    }
    for (std::int64_t i = 0; i < n; ++i) offer(i, keys[i]);
  }
};

template <typename D, typename Symbol>
struct Sampler : Children {
  using Children::Children;

  // The log-probs of the children that are left, and their nodes; returns how many they are. None where the row has no
  // log-probs: a NaN, +inf, or nothing above -inf.
  RADDPO_HD std::int64_t read(const typename D::T* row, int level, Range children) {
    RowSum s;
    std::int64_t n = 0;
    std::int32_t columns[kChunk];
    for (LiveChunks<Symbol, kChunk> chunk(t, children); chunk.next(); n += chunk.size) {
      columns_of(a, level, chunk.symbols, chunk.size, columns);
      for (int i = 0; i < chunk.size; ++i) nodes[n + i] = static_cast<std::uint32_t>(chunk.node(i));
      float* values = logps + n;
      const float scale = a.scale;
#pragma omp simd
      for (int i = 0; i < chunk.size; ++i) values[i] = D::load(row + columns[i]) * scale;
      const std::int64_t whole = padded(chunk.size);
      for (std::int64_t i = chunk.size; i < whole; ++i) values[i] = -INFINITY;
      if (children.count > 1) add_block<Float32>(s, values, whole);
    }
    const float lse = children.count > 1 ? log_sum_exp(s) : n ? logps[0] : -INFINITY;
    if (!(lse > -INFINITY && lse < INFINITY)) return 0;
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      const float logp = logps[i] - lse;
      logps[i] = logp > 0.f ? 0.f : logp;  // rounding must not lift a child above its parent
    }
    return n;
  }

  // As many beams as the result has offer each a candidate of its own perturbed score: nothing below the least of these
  // is among the best. -inf if there are fewer beams.
  float known_threshold(std::int64_t query, std::int64_t begin, std::int64_t end) const {
    float least = INFINITY;
    std::int64_t count = 0;
    for (std::int64_t i = query * a.width + begin; i < query * a.width + end; ++i) {
      const float key = a.perturbed[i];
      if (!(a.scores[i] > -INFINITY && key > -INFINITY && key < INFINITY)) continue;
      least = key < least ? key : least;
      ++count;
    }
    return count < a.beam_width ? -INFINITY : least - 1e-6f * (1.f + std::fabs(least));
  }

  // Returns whether each beam above the threshold offered a candidate.
  RADDPO_HD bool offer_beams(std::int64_t query, std::int64_t begin, std::int64_t end) {
    const auto* logits = static_cast<const typename D::T*>(a.logits) + query * a.stride_batch;
    LiveBeam beams[kGroup];
    bool all = true;
    for (std::int64_t first = begin; first < end; first += kGroup) {
      const int count = look_up<Symbol>(a, query * a.width + first, query * a.width + end, beams);
      prefetch_logits<D, Symbol>(a, logits + first * a.stride_beam, beams, count);
      for (int i = 0; i < count; ++i) {
        beam = beams[i];
        slot = static_cast<std::int32_t>(first + i);
        const float key = a.perturbed[query * a.width + slot];
        if (!(key > best.threshold)) continue;
        std::int64_t n = 0;
        if (!(beam.score > -INFINITY)) {
          all = all && !(a.scores[query * a.width + slot] > -INFINITY);
        } else if (beam.children.count == 0) {
          flush();
          push(best, {key, 0.f, slot, -1, beam.node});
        } else if (has_columns(a, beam.level) && (n = read(logits + slot * a.stride_beam, beam.level, beam.children))) {
          if (a.replacement)
            draw(n, static_cast<std::int64_t>(key));
          else
            sample(n, key);
        } else {
          all = false;
        }
      }
    }
    flush();
    return all;
  }

  RADDPO_HD void run(std::int64_t query, std::int64_t begin, std::int64_t end) {
    if (!a.replacement) best.threshold = known_threshold(query, begin, end);
    const bool known = best.threshold > -INFINITY;
    if (offer_beams(query, begin, end) || !known) return;
    best.count = 0;  // a beam without log-probs offers nothing: the threshold may have been too high
    best.threshold = -INFINITY;
    offer_beams(query, begin, end);
  }
};

template <typename D>
RADDPO_HD void run(const SampleStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best,
                   double* scratch) {
  if (a.trie.wide)
    Sampler<D, std::uint32_t>(a, query, best, scratch).run(query, begin, end);
  else
    Sampler<D, std::uint16_t>(a, query, best, scratch).run(query, begin, end);
}

}  // namespace

void sample_step(const SampleStepArgs& a, std::int64_t query, std::int64_t begin, std::int64_t end, Best& best,
                 double* scratch) {
  if (a.logit_type == LogitType::float32)
    run<Float32>(a, query, begin, end, best, scratch);
  else if (a.logit_type == LogitType::bfloat16)
    run<BFloat16>(a, query, begin, end, best, scratch);
  else
    run<Float16>(a, query, begin, end, best, scratch);
}

}  // namespace raddpo::RADDPO_ISA
