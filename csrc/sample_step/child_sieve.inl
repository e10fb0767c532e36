// Finds the children of one beam that matter, without their perturbed scores. Part of a per-instruction-set region.
#include "child_batch.inl"

namespace raddpo::RADDPO_ISA {
namespace {

constexpr int kTile = 32;  // children passed over at once

struct ChildSieve {
  float *logps, *latest;        // [children + kLanes]
  float* keys;                  // [children + kTile]
  int hits[ChildBatch::kSize];  // children whose perturbed scores are computed

  // A child's noise is -log(-log u), so that its own score is above x if -log u < p e^(score - x), and -log u is at
  // least 1 - u. Sets `keys` to (1 - u) / p, and to a little less where p is tiny, and `latest` to what -log u / p does
  // not exceed; returns the least of the latter: what comes behind the children, as if their p were tiny, is far above.
  float weigh(const std::uint32_t* bits, std::int64_t n) {
    const std::int64_t whole = padded(n);
    for (std::int64_t i = n; i < whole; ++i) logps[i] = -INFINITY;
    float soonest = INFINITY, *out = keys, *bounds = latest;
    const float* values = logps;
#pragma omp simd reduction(min : soonest)
    for (std::int64_t i = 0; i < whole; ++i) {
      const float inverse = fast_exp(values[i] > -87.f ? -values[i] : 87.f);
      const float rest = static_cast<float>(static_cast<std::int32_t>(~bits[i] >> 1)) * 0x1p-31f;
      const float above = rest + 0x1p-31f;
      const float bound = above < 0.5f ? (above + above * above) * inverse : INFINITY;  // x + x^2 > -log(1 - x)
      out[i] = rest * inverse;
      bounds[i] = bound;
      soonest = bound < soonest ? bound : soonest;
    }
    for (std::int64_t i = n; i < (n + kTile - 1) / kTile * kTile; ++i) keys[i] = NAN;
    return soonest;
  }

  // At least `wanted` of n weighed children have -log u / p up to this number; infinite where that is not known.
  float latest_of(std::int64_t wanted, std::int64_t n, float soonest) const {
    const float* bounds = latest;
    for (float bound = wanted > n ? INFINITY : soonest; bound < INFINITY; bound *= 4.f) {
      std::int32_t count = 0;
#pragma omp simd reduction(+ : count)
      for (std::int64_t i = 0; i < n; ++i) count += bounds[i] <= bound;
      if (count >= wanted) return bound;
    }
    return INFINITY;
  }

  // Which children of a tile reach the bar, one bit each.
  static std::uint32_t reaching(const float* tile, float bar) {
    std::uint32_t found = 0;
#ifdef RADDPO_BMI2
    for (int i = 0; i < kTile; i += 8) {
      const __m256 reach = _mm256_cmp_ps(_mm256_loadu_ps(tile + i), _mm256_set1_ps(bar), _CMP_LE_OQ);
      found |= static_cast<std::uint32_t>(_mm256_movemask_ps(reach)) << i;
    }
#else
    for (int i = 0; i < kTile; ++i) found |= static_cast<std::uint32_t>(tile[i] <= bar) << i;
#endif
    return found;
  }

  // Finds the children of [first, end) whose keys reach the bar; `first` is a multiple of kTile.
  int sieve(std::int64_t first, std::int64_t end, float bar) {
    int count = 0;
    for (; first < end; first += kTile)
      for (std::uint32_t found = reaching(keys + first, bar); found; found &= found - 1)
        hits[count++] = static_cast<int>(first) + count_trailing_zeros(found);
    return count;
  }
};

}  // namespace
}  // namespace raddpo::RADDPO_ISA
