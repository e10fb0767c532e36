// Bit streams as functions to call, once for each instruction set.
#include "../csrc/trie_index/bit_stream.h"

namespace raddpo::RADDPO_ISA {

std::uint64_t spread_bits(std::uint64_t x, std::uint64_t mask) { return spread(x, mask); }
std::uint64_t gather_bits(std::uint64_t x, std::uint64_t mask) { return gather(x, mask); }

// Copies bits [begin, end) of `from`, then `ones` ones, to bit `at` of `to`; returns where that ends.
std::int64_t splice_bits(const std::uint64_t* from, std::int64_t begin, std::int64_t end, std::int64_t ones,
                         std::uint64_t* to, std::int64_t at) {
  std::uint64_t head = 0;
  BitSplice out{from, begin, to, at, &head};
  out.copy_to(end);
  out.put_degree(ones, false);
  out.finish();
  to[at / 64] |= head;
  return out.to;
}

}  // namespace raddpo::RADDPO_ISA
