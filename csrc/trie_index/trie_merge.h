#pragma once
// Two tries as one, without building it anew. Host only, no torch.
#include "trie_block.h"

namespace raddpo {

// `trie` with what `added` holds beside it: whole blocks of the same vocab and distinct items. The same as a build of
// the items of both, a SID's items of `trie` first. Throws std::invalid_argument where one's SID is a proper prefix of
// the other's.
TrieBytes trie_merge(const std::uint8_t* trie, const std::uint8_t* added);

}  // namespace raddpo
