#include <cstdint>
#include <cstring>

#include "../common/math.h"
#include "trie_check.h"

#define RADDPO_KERNELS "../trie_index/trie_check_cpu.inl"
#include "../common/foreach_isa.h"
