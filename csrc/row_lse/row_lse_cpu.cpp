#include <cmath>
#include <cstdint>

#include "../common/math.h"
#include "row_lse.h"

#define RADDPO_KERNELS "../row_lse/row_lse_cpu.inl"
#include "../common/foreach_isa.h"
