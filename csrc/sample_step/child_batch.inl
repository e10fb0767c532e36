// Children of several beams, whose perturbed scores are computed together: most beams have few children, or few that
// matter, and a vector holds 16. Part of a per-instruction-set region.
#include "child_noise.inl"

namespace raddpo::RADDPO_ISA {
namespace {

constexpr int kLanes = 16;    // of the widest vectors
constexpr int kBatch = 512;   // children of one beam whose perturbed scores are computed at once
constexpr int kWaiting = 64;  // children that wait for the next beam's, at most

// Whole vectors: a rest is computed one by one, which takes long, and is rounded otherwise.
RADDPO_HD std::int64_t padded(std::int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

struct ChildBatch {
  static constexpr int kSize = kWaiting + kBatch + kLanes;
  static constexpr int kOwn = 4 * kSize;  // words before this one are of blocks

  struct Beam {
    float score, parent;  // `parent`: its perturbed score
    std::int32_t slot;
    int level, first;  // its children begin at `first`
  };

  int count = 0, num_beams = 0, num_blocks = 0;
  Beam beams[kWaiting + 1];
  int owners[kSize];                          // of each child its beam,
  std::uint32_t nodes[kSize], blocks[kSize];  // blocks to be drawn
  std::int32_t places[kSize];                 // of each child's random bits among the words
  std::uint32_t words[kOwn + kSize], bits[kSize];
  float logps[kSize], scores[kSize], parents[kSize], most[kSize], keys[kSize];

  ChildBatch() { words[0] = 0; }

  void clear() { count = num_beams = num_blocks = 0; }

  bool is_full() const { return count >= kWaiting || num_beams >= kWaiting; }

  void open(const LiveBeam& beam, std::int32_t slot, float parent) {
    beams[num_beams++] = {beam.score, parent, slot, beam.level, count};
  }

  // Adds a child of the last beam. The place of an only child's random bits does not matter.
  void add(std::uint32_t node, float logp, std::int32_t place = 0) {
    owners[count] = num_beams - 1;
    nodes[count] = node;
    places[count] = place;
    logps[count] = logp;
    scores[count] = beams[num_beams - 1].score;
    parents[count++] = beams[num_beams - 1].parent;
  }

  void add_drawn(std::uint32_t node, float logp, std::uint32_t word) {
    words[kOwn + count] = word;
    add(node, logp, kOwn + count);
  }

  void add_undrawn(std::uint32_t node, float logp) {
    if (!num_blocks || blocks[num_blocks - 1] != node / 4) blocks[num_blocks++] = node / 4;
    add(node, logp, static_cast<std::int32_t>(4 * (num_blocks - 1) + node % 4));
  }

  // Sets the keys to the children's own perturbed scores.
  void perturb(const Noise& noise) {
    noise.draw_listed(blocks, num_blocks, words);
    const auto whole = static_cast<int>(padded(count));
    for (int k = count; k < whole; ++k) {
      places[k] = places[0];
      logps[k] = logps[0];
      scores[k] = scores[0];
      parents[k] = parents[0];
    }
    for (int k = 0; k < whole; ++k) bits[k] = words[places[k]];
    add_noise(whole);
  }

  // Sets the keys to perturbed scores, of which none is above that of the beam.
  void condition() {
    for (int b = 0; b < num_beams; ++b) {
      const int end = b + 1 < num_beams ? beams[b + 1].first : count;
      float best = -INFINITY;
      for (int k = beams[b].first; k < end; ++k) best = keys[k] > best ? keys[k] : best;
      for (int k = beams[b].first; k < end; ++k) most[k] = best;
    }
    condition_on_most();
  }

  // Of one beam, whose best child has this score of its own.
  void condition(float best) {
    for (int k = 0; k < count; ++k) most[k] = best;
    condition_on_most();
  }

  float best_key() const {
    float best = -INFINITY;
    for (int k = 0; k < count; ++k) best = keys[k] > best ? keys[k] : best;
    return best;
  }

 private:
  // Never inlined: a child's key has the same bits whichever others are computed with it.
  __attribute__((noinline)) void add_noise(int whole) {
#pragma omp simd
    for (int k = 0; k < whole; ++k) keys[k] = scores[k] + logps[k] + gumbel(bits[k]);
  }

  __attribute__((noinline)) void condition_on_most() {
    const auto whole = static_cast<int>(padded(count));
    for (int k = count; k < whole; ++k) most[k] = most[0];
#pragma omp simd
    for (int k = 0; k < whole; ++k) keys[k] = conditioned(parents[k], keys[k], most[k]);
  }
};

}  // namespace
}  // namespace raddpo::RADDPO_ISA
