#include "session_loss_cpu.h"

#include <cmath>
#include <cstdint>

#include "session_loss_math.h"

#define RADDPO_KERNELS "../session_loss/session_loss_cpu.inl"
#include "../common/foreach_isa.h"
