#include "group_advantages_cpu.h"

#include <cmath>
#include <cstdint>

#include "group_advantages_math.h"

#define RADDPO_KERNELS "../group_advantages/group_advantages_cpu.inl"
#include "../common/foreach_isa.h"
