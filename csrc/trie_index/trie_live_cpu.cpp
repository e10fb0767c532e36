#include <cstdint>
#include <cstring>

#include "../common/math.h"
#include "trie_live.h"

#define RADDPO_KERNELS "../trie_index/trie_live_cpu.inl"
#include "../common/foreach_isa.h"
