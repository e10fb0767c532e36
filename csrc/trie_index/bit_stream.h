// Reading, appending, packing, spreading and gathering bits in order. Part of a per-instruction-set region.
namespace raddpo::RADDPO_ISA {
namespace {

RADDPO_HD std::uint64_t low_bits(int n) { return n < 64 ? (std::uint64_t(1) << n) - 1 : ~std::uint64_t(0); }

// Moves the low bits of x to where mask has ones.
RADDPO_HD std::uint64_t spread(std::uint64_t x, std::uint64_t mask) {
#if defined(RADDPO_BMI2)
  return __builtin_ia32_pdep_di(x, mask);
#else
  std::uint64_t out = 0;
  for (; mask; mask &= mask - 1, x >>= 1) out |= x & 1 ? mask & -mask : 0;
  return out;
#endif
}

// Moves the bits of x where mask has ones to the low bits.
RADDPO_HD std::uint64_t gather(std::uint64_t x, std::uint64_t mask) {
#if defined(RADDPO_BMI2)
  return __builtin_ia32_pext_di(x, mask);
#else
  std::uint64_t out = 0;
  for (int to = 0; mask; mask &= mask - 1, ++to) out |= std::uint64_t((x & mask & -mask) != 0) << to;
  return out;
#endif
}

// One bit per byte, for n <= 64 bytes that are 0 or 1.
RADDPO_HD std::uint64_t pack(const std::uint8_t* bytes, int n) {
  std::uint64_t bits = 0;
  for (int i = 0; i + 8 <= n; i += 8) {
    std::uint64_t eight;
    std::memcpy(&eight, bytes + i, 8);
    bits |= (eight * 0x0102040810204080 >> 56) << i;  // byte k moves to bit 56 + k; no two overlap
  }
  for (int i = n & ~7; i < n; ++i) bits |= std::uint64_t(bytes[i]) << i;
  return bits;
}

struct BitReader {
  const std::uint64_t* words;
  std::int64_t at;
  RADDPO_HD std::uint64_t next(int n) {  // at most 64
    if (!n) return 0;
    const std::int64_t word = at / 64;
    const int shift = static_cast<int>(at % 64);
    std::uint64_t bits = words[word] >> shift;
    if (shift + n > 64) bits |= words[word + 1] << (64 - shift);
    at += n;
    return bits & low_bits(n);
  }
};

// Appends bits to memory that is zero.
struct BitAppender {
  std::uint64_t* words;
  std::int64_t at;
  RADDPO_HD void put(std::uint64_t bits, int n) {
    if (!n) return;
    const std::int64_t word = at / 64;
    const int shift = static_cast<int>(at % 64);
    words[word] |= bits << shift;
    if (shift + n > 64) words[word + 1] |= bits >> (64 - shift);
    at += n;
  }
  RADDPO_HD void put_ones(std::int64_t n) {
    for (; n > 0; n -= 64) put(low_bits(n < 64 ? static_cast<int>(n) : 64), n < 64 ? static_cast<int>(n) : 64);
  }
  RADDPO_HD void copy(const std::uint64_t* from, std::int64_t begin, std::int64_t end) {
    BitReader reader{from, begin};
    while (reader.at < end) {
      const int n = end - reader.at < 64 ? static_cast<int>(end - reader.at) : 64;
      put(reader.next(n), n);
    }
  }
};

}  // namespace
}  // namespace raddpo::RADDPO_ISA
