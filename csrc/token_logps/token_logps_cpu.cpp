#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/math.h"
#include "../common/rounded_lse.h"
#include "token_logps_math.h"

#define RADDPO_KERNELS "../token_logps/token_logps_cpu.inl"
#include "../common/foreach_isa.h"
