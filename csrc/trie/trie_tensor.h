#pragma once
// From the tensors of a TrieIndex to the view that kernels take.
#include "../common/tensor.h"
#include "../trie_index/trie_view.h"

namespace raddpo {

// `trie`: uint8, the whole block, on the op's device; `header`: its first kHeaderWords words as int64 on the CPU;
// `live`: uint8, which nodes and items are left (trie_view.h), on the device of `trie`.
TrieView trie_view(const Tensor& trie, const Tensor& header, const OptionalTensor& live, const char* op);

}  // namespace raddpo
