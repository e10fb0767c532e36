#include <cmath>
#include <cstdint>

#include "../beam_search/beam_search_math.h"
#include "../trie_index/live_chunks.h"
#include "sample_step.h"
#include "sample_step_math.h"

#define RADDPO_KERNELS "../sample_step/sample_step_cpu.inl"
#include "../common/foreach_isa.h"
