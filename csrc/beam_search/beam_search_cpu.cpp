#include <cmath>
#include <cstdint>

#include "../common/math.h"
#include "../trie_index/live_chunks.h"
#include "beam_search_math.h"

#define RADDPO_KERNELS "../beam_search/beam_search_cpu.inl"
#include "../common/foreach_isa.h"
