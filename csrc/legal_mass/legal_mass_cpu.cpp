#include <cmath>
#include <cstdint>

#include "../common/math.h"
#include "../common/rounded_lse.h"
#include "legal_mass.h"

#define RADDPO_KERNELS "../legal_mass/legal_mass_cpu.inl"
#include "../common/foreach_isa.h"
