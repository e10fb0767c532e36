#pragma once
// Merges two tries without a new build. Host only, no torch.
#include "trie_block.h"

namespace raddpo {

// Merges `added` into `trie`: finished blocks of the same vocab and of distinct items. The result is that of a build of
// the items of both, within a SID those of `trie` first. Throws std::invalid_argument if a SID of one is a proper
// prefix of a SID of the other.
TrieBytes trie_merge(const std::uint8_t* trie, const std::uint8_t* added);

}  // namespace raddpo
