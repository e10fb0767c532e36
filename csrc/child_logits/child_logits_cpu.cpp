#include <cmath>
#include <cstdint>

#include "../trie_index/live_chunks.h"
#include "child_logits_math.h"

#define RADDPO_KERNELS "../child_logits/child_logits_cpu.inl"
#include "../common/foreach_isa.h"
