#include <cstdint>
#include <limits>

#include "../common/math.h"
#include "assign_balanced.h"

#define RADDPO_KERNELS "../assign_balanced/assign_balanced_cpu.inl"
#include "../common/foreach_isa.h"
