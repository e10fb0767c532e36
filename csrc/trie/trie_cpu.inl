// A lookup waits for memory, not for arithmetic. So the rows of a walk go down a level together, and the nodes of paths
// up, a group at a time: each stage fetches what the next one reads, and the group's cache misses overlap.
namespace raddpo::RADDPO_ISA {
namespace {

constexpr int kGroup = 32;

struct Step {
  std::int64_t node;    // -1: off the trie
  std::int64_t symbol;  // of the edge to the child
  std::int64_t block;   // of the zero before the node's own bits
  Range children;
  std::int64_t low, high;  // the child is among these, if there is one
};

template <typename Symbol>
RADDPO_HD void go_down(const TrieView& t, int level, Step* steps, int count) {
  const DegreeSequence& bits = t.children;
  const auto* symbols = static_cast<const Symbol*>(t.symbols);
  for (int k = 0; k < count; ++k)
    if (steps[k].node > 0) __builtin_prefetch(bits.ranks + bits.hints[(steps[k].node - 1) / kHintZeros]);
  for (int k = 0; k < count; ++k) {
    if (steps[k].node <= 0) continue;
    steps[k].block = block_of_zero(bits, steps[k].node - 1);
    __builtin_prefetch(bits.bits + steps[k].block * (kBlockBits / 64));
  }
  for (int k = 0; k < count; ++k) {
    Step& s = steps[k];
    if (s.node < 0) continue;
    const Range ones = ones_from(bits, s.node ? zero_in_block(bits, s.block, s.node - 1) + 1 : 0, s.node);
    s.children = {ones.first + 1, ones.count};  // the root is not a child
    const Range inside = places_of_symbol(t, level, s.children, s.symbol);
    s.low = inside.first, s.high = inside.first + inside.count;
    __builtin_prefetch(symbols + (s.low + s.high) / 2);
  }
  for (bool more = true; more;) {  // a binary search's step each
    more = false;
    for (int k = 0; k < count; ++k) {
      Step& s = steps[k];
      if (s.node < 0 || s.low >= s.high) continue;
      const std::int64_t middle = (s.low + s.high) / 2;
      const bool behind = symbols[middle] < s.symbol;
      s.low = behind ? middle + 1 : s.low;
      s.high = behind ? s.high : middle;
      __builtin_prefetch(symbols + (s.low + s.high) / 2);
      more = true;
    }
  }
  for (int k = 0; k < count; ++k) {
    Step& s = steps[k];
    if (s.node < 0) continue;
    const bool found = s.low < s.children.first + s.children.count && symbols[s.low] == s.symbol;
    s.node = found && is_live(t.live_nodes, s.low) ? s.low : -1;
    if (s.node > 0) __builtin_prefetch(bits.hints + (s.node - 1) / kHintZeros);
  }
}

struct Climb {
  std::int64_t node;
  int depth;  // -1: no node
  std::int64_t* codes;
  ParentBlocks blocks;
  std::int64_t block;  // of the edge to the node
};

RADDPO_HD Climb start_climb(const TriePathsArgs& a, std::int64_t i) {
  const std::int64_t node = a.nodes[i], sid_levels = a.trie.sid_levels;
  const int depth = is_node(a.trie, node) ? depth_of(a.trie, node) : -1;
  std::int64_t* codes = a.codes + i * sid_levels;
  for (std::int64_t level = depth < 0 ? 0 : depth; level < sid_levels; ++level) codes[level] = -1;
  a.depths[i] = depth;
  return {node, depth, codes, {}, 0};
}

// Writes the codes of the nodes at depth `level` + 1 and goes to their parents.
RADDPO_HD void go_up(const TriePathsArgs& a, int level, Climb* climbs, int count) {
  const TrieView& t = a.trie;
  for (int k = 0; k < count; ++k) {
    Climb& c = climbs[k];
    if (c.depth <= level) continue;
    __builtin_prefetch(static_cast<const char*>(t.symbols) + c.node * (t.wide ? 4 : 2));
    if (!level) continue;
    c.blocks = parent_blocks(t, c.node, level + 1);
    __builtin_prefetch(t.children.ranks + c.blocks.guess);
  }
  for (int k = 0; k < count && level; ++k) {
    Climb& c = climbs[k];
    if (c.depth <= level) continue;
    c.block = parent_block(t, c.node, c.blocks);
    __builtin_prefetch(t.children.bits + c.block * (kBlockBits / 64));
  }
  for (int k = 0; k < count; ++k) {
    Climb& c = climbs[k];
    if (c.depth <= level) continue;
    if (level < t.sid_levels) c.codes[level] = code_of(t, level, symbol_of(t, c.node));
    if (level) c.node = parent_in_block(t, c.node, c.block);
  }
}

}  // namespace

void trie_walk(const TrieWalkArgs& a, std::int64_t begin, std::int64_t end) {
  Step steps[kGroup];
  for (std::int64_t first = begin; first < end; first += kGroup) {
    const int count = static_cast<int>(end - first < kGroup ? end - first : kGroup);
    std::int64_t* nodes = a.nodes + first * (a.columns + 1);
    for (int k = 0; k < count; ++k) nodes[k * (a.columns + 1)] = steps[k].node = 0;
    for (int level = 0; level < a.columns; ++level) {
      for (int k = 0; k < count; ++k) {
        Step& s = steps[k];
        if (s.node < 0) continue;
        s.symbol =
            level < a.trie.levels ? symbol_of_token(a.trie, level, a.tokens[(first + k) * a.columns + level]) : -1;
        if (s.symbol < 0) s.node = -1;
      }
      if (a.trie.wide)
        go_down<std::uint32_t>(a.trie, level, steps, count);
      else
        go_down<std::uint16_t>(a.trie, level, steps, count);
      for (int k = 0; k < count; ++k) nodes[k * (a.columns + 1) + level + 1] = steps[k].node;
    }
  }
}

void trie_paths(const TriePathsArgs& a, std::int64_t begin, std::int64_t end) {
  Climb climbs[kGroup];
  for (std::int64_t first = begin; first < end; first += kGroup) {
    const int count = static_cast<int>(end - first < kGroup ? end - first : kGroup);
    for (int k = 0; k < count; ++k) climbs[k] = start_climb(a, first + k);
    for (int level = a.trie.levels - 1; level >= 0; --level) go_up(a, level, climbs, count);
  }
}

void trie_ranges(const TrieRangesArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) trie_range(a, i);
}

void trie_top_items(const TrieTopItemsArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    std::int64_t place = 0;
    for (std::int64_t column = 0; column < a.columns && place < a.top_k; ++column) {
      const Range range = live_range(a.trie, a.nodes[row * a.columns + column], true);
      put_items(a, row, column, range, place);
      place += range.count;
    }
    for (; place < a.top_k; ++place) put_nothing(a, row, place);
  }
}

void trie_select(const TrieSelectArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) raddpo::trie_select(a, i);
}

}  // namespace raddpo::RADDPO_ISA
