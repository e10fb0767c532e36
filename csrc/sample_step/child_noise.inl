// The random bits of sample_step's children: blocks of `philox`, several at once. Part of a per-instruction-set region.
namespace raddpo::RADDPO_ISA {
namespace {

struct Noise {
  std::uint64_t seed, query_key;
  std::uint64_t round_keys[20];  // two a round

  Noise(std::uint64_t seed_, std::uint64_t query_key_) : seed(seed_), query_key(query_key_) {
    for (int round = 0; round < 10; ++round) {
      round_keys[2 * round] = seed + round * std::uint64_t(0x9E3779B9u);
      round_keys[2 * round + 1] = (seed >> 32) + round * std::uint64_t(0xBB67AE85u);
    }
  }

#ifdef RADDPO_BMI2
#ifdef RADDPO_AVX512
  static constexpr int kBlocks = 8;  // at once
  using Lanes = unsigned long long __attribute__((vector_size(64)));
  static constexpr Lanes kCount{0, 1, 2, 3, 4, 5, 6, 7};
  static Lanes product(Lanes x, std::uint32_t y) {
    return (Lanes)_mm512_maskz_mul_epu32(0xff, (__m512i)x, _mm512_set1_epi64(y));
  }
  static Lanes load(const std::uint32_t* x) {
    return (Lanes)_mm512_maskz_cvtepu32_epi64(0xff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static void interleave(Lanes x, Lanes y, std::uint32_t* out) {
    const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                  rest = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64((__m512i)x, first, (__m512i)y));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64((__m512i)x, rest, (__m512i)y));
  }
#else
  static constexpr int kBlocks = 4;
  using Lanes = unsigned long long __attribute__((vector_size(32)));
  static constexpr Lanes kCount{0, 1, 2, 3};
  static Lanes product(Lanes x, std::uint32_t y) { return (Lanes)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(y)); }
  static Lanes load(const std::uint32_t* x) {
    return (Lanes)_mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static void interleave(Lanes x, Lanes y, std::uint32_t* out) {
    const __m256i even = _mm256_unpacklo_epi64((__m256i)x, (__m256i)y),
                  odd = _mm256_unpackhi_epi64((__m256i)x, (__m256i)y);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
  }
#endif

  // `philox` of these counters. A number is the low half of a 64-bit lane, and the high half is ignored: GCC's own
  // vectors are full, so that each product costs it five permutations.
  void draw_blocks(Lanes c0, std::uint32_t* out) const {
    Lanes c1{}, c2 = Lanes{} + query_key, c3 = c2 >> 32;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Lanes p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ round_keys[2 * round];
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ round_keys[2 * round + 1];
      c3 = p0;
    }
    interleave((c0 & 0xffffffffu) | c1 << 32, (c2 & 0xffffffffu) | c3 << 32, out);
  }
#endif

  // The four words of each listed block; there is memory for 8 more blocks.
  void draw_listed(std::uint32_t* blocks, int count, std::uint32_t* words) const {
#ifdef RADDPO_BMI2
    for (int i = count; i % kBlocks; ++i) blocks[i] = 0;
    for (int i = 0; i < count; i += kBlocks) draw_blocks(load(blocks + i), words + 4 * i);
#else
    for (int i = 0; i < count; ++i) {
      std::uint32_t four[4];
      philox(blocks[i], 0, query_key, seed, four);
      std::memcpy(words + 4 * i, four, sizeof four);
    }
#endif
  }

  // The random bits of n nodes in order. `words`: for the nodes from the first of them to the last, and 38 more.
  const std::uint32_t* draw_words(const std::uint32_t* nodes, std::int64_t n, std::uint32_t* words) const {
    const std::uint32_t block = nodes[0] / 4;
    const std::int64_t blocks = (nodes[n - 1] / 4 - block + 8) / 8 * 8;  // whole vectors of them
#ifdef RADDPO_BMI2
    for (std::int64_t i = 0; i < blocks; i += kBlocks)
      draw_blocks(kCount + (block + static_cast<std::uint32_t>(i)), words + 4 * i);
#else
#pragma omp simd
    for (std::int64_t i = 0; i < blocks; ++i) {
      std::uint32_t four[4];
      philox(block + static_cast<std::uint32_t>(i), 0, query_key, seed, four);
      words[4 * i] = four[0];
      words[4 * i + 1] = four[1];
      words[4 * i + 2] = four[2];
      words[4 * i + 3] = four[3];
    }
#endif
    if (nodes[n - 1] - nodes[0] == n - 1) return words + nodes[0] % 4;
    for (std::int64_t i = 0; i < n; ++i) words[i] = words[nodes[i] - 4 * block];
    return words;
  }
};

}  // namespace
}  // namespace raddpo::RADDPO_ISA
