#include <cstdint>
#include <cstring>

#include "../common/math.h"
#include "trie_live.h"

#define RADDPO_KERNELS "../trie/trie_live_cpu.inl"
#include "../common/foreach_isa.h"
