#pragma once
// The noise of a draw and the perturbed scores made of it, on host and device.
#include "../common/math.h"

namespace raddpo {

// 128 random bits by Philox 4x32-10 (Salmon et al., 2011): a function of the counter (low, high, query) and of the
// seed, whoever asks for it and when.
RADDPO_HD void philox(std::uint32_t low, std::uint32_t high, std::uint64_t query, std::uint64_t seed,
                      std::uint32_t (&out)[4]) {
  std::uint32_t c0 = low, c1 = high, c2 = static_cast<std::uint32_t>(query);
  std::uint32_t c3 = static_cast<std::uint32_t>(query >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t(0xD2511F53u) * c0, p1 = std::uint64_t(0xCD9E8D57u) * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// The noise of a child node is word number node % 4 of the block at (node / 4, 0), so that four siblings share a block;
// that of draw j through a beam is the first word at (the beam's node, 1 + j).
RADDPO_HD std::uint32_t draw_noise(std::int64_t node, std::int64_t draw, std::uint64_t query, std::uint64_t seed) {
  std::uint32_t words[4];
  philox(static_cast<std::uint32_t>(node), static_cast<std::uint32_t>(1 + draw), query, seed, words);
  return words[0];
}

// log(y) to 2e-7 relative, for normal y > 0; `less` is y - 1 as exactly as it is known, so that nothing cancels.
RADDPO_HD float log_of(float y, float less) {
  std::uint32_t bits;
  std::memcpy(&bits, &y, 4);
  const bool near = std::fabs(less - 0.06f) < 0.35f;
  const std::int32_t exponent = static_cast<std::int32_t>(bits - 0x3f3504f3u) >> 23;  // of a mantissa around 1
  bits -= static_cast<std::uint32_t>(exponent) << 23;
  float mantissa;
  std::memcpy(&mantissa, &bits, 4);
  const float f = near ? less : mantissa - 1.f;
  float p = -7.63449302e-2f;  // minimax, of log(1 + f) = f - f^2 / 2 + f^3 p
  p = p * f + 1.27615756e-1f;
  p = p * f - 1.31601831e-1f;
  p = p * f + 1.42017582e-1f;
  p = p * f - 1.66233573e-1f;
  p = p * f + 2.00012269e-1f;
  p = p * f - 2.50008210e-1f;
  p = p * f + 3.33333317e-1f;
  return f + (f * f * (f * p - 0.5f) + (near ? 0.f : 0.693147181f * static_cast<float>(exponent)));
}

// Rounded once. Compilers vectorise the conversion of signed numbers.
RADDPO_HD float to_float(std::uint32_t word) {
#if defined(__CUDA_ARCH__)
  return static_cast<float>(word);
#else
  return static_cast<float>(static_cast<std::int32_t>(word >> 16)) * 65536.f +
         static_cast<float>(static_cast<std::int32_t>(word & 0xffff));
#endif
}

// -log(-log u) of u = (word + 1/2) / 2^32. Above 0.7 u is known by 1 - u, of which the bits of `word` are all kept.
RADDPO_HD float gumbel(std::uint32_t word) {
  const float u = (to_float(word) + 0.5f) * 0x1p-32f;
  const float rest = (to_float(~word) + 0.5f) * 0x1p-32f;
  const float exponential = -log_of(u, -rest);
  return -log_of(exponential, exponential - 1.f);
}

// The perturbed score of a child: its own is `score`, the best of its siblings `most`, and that one has the score of
// their parent, bit for bit. It is -log(e^-parent - e^-most + e^-score), without a difference of large numbers.
RADDPO_HD float conditioned(float parent, float score, float most) {
  const float x = score - most;  // at most 0
  const float e = fast_exp(x);
  const float series =  // of 1 - e^x
      -x * (1.f + x * (1.f / 2) *
                      (1.f + x * (1.f / 3) * (1.f + x * (1.f / 4) * (1.f + x * (1.f / 5) * (1.f + x * (1.f / 6))))));
  const float v = parent - score + log_of(x > -0.3f ? series : 1.f - e, -e);
  const float tail = fast_exp(v < 0.f ? v : -v);
  const float below = (v > 0.f ? v : 0.f) + log_of(1.f + tail, tail);
  return x == 0.f ? parent : parent - below;
}

}  // namespace raddpo
