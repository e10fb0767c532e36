#include <cstdint>

#include "trie_ops.h"

#define RADDPO_KERNELS "../trie/trie_cpu.inl"
#include "../common/foreach_isa.h"
