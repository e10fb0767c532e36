#include <cstdint>
#include <cstring>

#include "trie_merge.h"

#define RADDPO_KERNELS "../trie_index/trie_merge_cpu.inl"
#include "../common/foreach_isa.h"
