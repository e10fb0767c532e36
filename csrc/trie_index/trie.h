#pragma once
// TrieIndex in memory: one block of bytes, the same in RAM, in a file and on a GPU.
//
// Nodes are numbered breadth first (root 0), so the children of a node are consecutive. Two degree sequences describe
// the whole shape: `children` holds, node after node, one 1 per child and a closing 0 (LOUDS); `items` holds the same
// for the items of each node. The block's other sections are the symbol on the edge into each node, and the item ids.
// A symbol is the rank of the edge's token id among its level's token ids: ascending symbols are ascending token ids.
// With an end-of-sequence token every SID ends in that token's symbol, so that exactly the leaves are whole SIDs.
#include <cstdint>

struct CUstream_st;

namespace raddpo {

constexpr int kMaxLevels = 32;     // of a SID, its end-of-sequence token included
constexpr int kHeaderWords = 512;  // 64-bit words before the first section
constexpr int kFormatVersion = 1;
constexpr std::int64_t kMaxCodes = 1 << 24;  // of a vocab, over all levels
constexpr int kBlockBits = 512;              // one rank for every 512 bits
constexpr int kHintZeros = 512;              // one hint for every 512 zeros

// Node i owns the bits between zero i - 1 and zero i. Bits past the last zero are never read.
struct DegreeSequence {
  const std::uint64_t* bits;
  const std::uint32_t* ranks;  // zeros before each block of 512 bits
  const std::uint32_t* hints;  // the block that holds zero 512 k; then the last block
};

// Which nodes or items are left: one bit per node or item, 1 if it is left.
struct LiveBits {
  const std::uint64_t* bits;   // null: all are left
  const std::uint32_t* ranks;  // zeros before each block of 512 bits
};

struct TrieView {
  DegreeSequence children, items;
  LiveBits live_nodes, live_items;          // both null or neither; a node is left if any item under it is
  const void* symbols;                      // [nodes] uint16, or uint32 where wide; the root's is unused
  const std::int32_t* tokens;               // tables of the levels that have one: token id of each symbol, ascending
  const std::int32_t* codes;                // code of each symbol in these, -1 for the end-of-sequence token
  std::int64_t first_node[kMaxLevels + 2];  // of each depth; from depth levels + 1 on the number of nodes
  std::int32_t num_symbols[kMaxLevels];     // of each level
  std::int32_t table[kMaxLevels];           // where the level's table begins, or -1: token = first_token + symbol
  std::int32_t first_token[kMaxLevels];     // and code = symbol
  std::int32_t levels;                      // depth of the deepest leaf
  std::int32_t sid_levels;                  // columns of a SID
  std::int32_t wide;
};

// The header's words. Section offsets are in bytes from the start of the block, each a multiple of 64.
enum HeaderWord : int {
  kMagic,
  kVersion,
  kBytes,
  kChecksum,  // of every other byte
  kNumItems,
  kNumSids,
  kNumNodes,
  kLevels,
  kSidLevels,
  kWide,
  kItemBytes,
  kEos,       // token id, or -1
  kHasVocab,  // 0: a code is its token id
  kSymbols = 16,
  kChildBits,
  kChildRanks,
  kChildHints,
  kItemBits,
  kItemRanks,
  kItemHints,
  kItems,
  kTokens,
  kCodes,
  kFirstNode = 32,                            // kMaxLevels + 2 words
  kNumSymbols = kFirstNode + kMaxLevels + 2,  // kMaxLevels words each from here on
  kTable = kNumSymbols + kMaxLevels,
  kFirstToken = kTable + kMaxLevels,
  kSizes = kFirstToken + kMaxLevels,  // codes of the level, with those that have no token
  kMaxToken = kSizes + kMaxLevels,    // the largest token id of the level
  kHeaderEnd = kMaxToken + kMaxLevels
};
static_assert(kHeaderEnd <= kHeaderWords);

}  // namespace raddpo
