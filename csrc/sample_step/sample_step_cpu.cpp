#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../beam_search/beam_search_math.h"
#include "../trie_index/live_chunks.h"
#include "sample_step.h"
#include "sample_step_math.h"

#define RADDPO_KERNELS "../sample_step/sample_step_cpu.inl"
#include "../common/foreach_isa.h"
