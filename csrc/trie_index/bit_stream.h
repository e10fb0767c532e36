// Reading, appending, splicing, packing, spreading and gathering bits in order. Part of a per-instruction-set region.
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
};

// Copies bits, with insertions, to memory that need not be zero. Whole words are written, also the last one; the first
// one is kept where the share before this one ends in it.
struct BitSplice {
  const std::uint64_t* from;
  std::int64_t at;  // in `from`
  std::uint64_t* words;
  std::int64_t to;
  std::uint64_t* head;  // outside of this, so that the rest stays in registers
  std::int64_t kept = to % 64 ? to / 64 : -1;
  std::uint64_t value = 0;  // of the word of bit `to`

  RADDPO_HD void put(std::uint64_t bits, int n) {  // at most 64
    if (!n) return;
    const std::int64_t word = to / 64;
    const int shift = static_cast<int>(to % 64);
    value |= bits << shift;
    *(word == kept ? head : words + word) = value;
    to += n;
    value = to / 64 == word ? value : bits >> 1 >> (63 - shift);
  }
  RADDPO_HD void put_zeros(std::int64_t n) {
    for (; n > 0; n -= 64) put(0, n < 64 ? static_cast<int>(n) : 64);
  }
  // Ones, and the zero that ends a node.
  RADDPO_HD void put_degree(std::int64_t ones, bool zero) {
    for (; ones > 63; ones -= 63) put(low_bits(63), 63);
    put(low_bits(static_cast<int>(ones)), static_cast<int>(ones) + zero);
  }
  RADDPO_HD void copy(int n) {  // at most 64; reads one word more than they are in
    const std::int64_t word = at / 64;
    const int shift = static_cast<int>(at % 64);
    put((from[word] >> shift | from[word + 1] << 1 << (63 - shift)) & low_bits(n), n);
    at += n;
  }
  RADDPO_HD void copy_to(std::int64_t end) {
    if (end - at >= 512) copy_words(end);
    for (; end - at > 64;) copy(64);
    copy(static_cast<int>(end - at));
  }
  // A long stretch, but for its end.
  RADDPO_HD void copy_words(std::int64_t end) {
    copy(static_cast<int>(64 - to % 64));
    const std::int64_t count = (end - at) / 64;
    const std::uint64_t* in = from + at / 64;
    std::uint64_t* out = words + to / 64;
    const int shift = static_cast<int>(at % 64);
    for (std::int64_t i = 0; i < count; ++i) out[i] = in[i] >> shift | in[i + 1] << 1 << (63 - shift);
    at += 64 * count;
    to += 64 * count;
  }
  // After the last bit.
  RADDPO_HD void finish() const {
    if (to % 64) *(to / 64 == kept ? head : words + to / 64) = value;
  }
};

}  // namespace
}  // namespace raddpo::RADDPO_ISA
