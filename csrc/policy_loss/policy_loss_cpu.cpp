#include "policy_loss_cpu.h"

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "policy_loss_math.h"

#define RADDPO_KERNELS "../policy_loss/policy_loss_cpu.inl"
#include "../common/foreach_isa.h"
