#include <cmath>
#include <cstdint>

#include "../common/math.h"
#include "../trie/trie_math.h"
#include "beam_search.h"

#define RADDPO_KERNELS "../beam_search/beam_search_cpu.inl"
#include "../common/foreach_isa.h"
