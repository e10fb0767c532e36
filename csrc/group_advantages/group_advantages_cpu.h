#pragma once
// The CPU kernels of group_advantages, one variant per instruction set.
#include "group_advantages.h"

namespace raddpo {

// A thread's scratch memory, reused from group to group; [counted] rows of a group.
struct GroupScratch {
  std::int64_t* rows;           // [counted] their numbers
  std::int64_t *order, *spare;  // [counted] places in `rows`, ordered by SID
  std::int32_t* shared;         // [counted] tokens in common with the row before, in that order
  double *rewards, *weights;    // [counted]
  double* sequence;             // [counted] advantages of whole rows
  double* scores;               // [counted, levels]
};

// group_advantages returns whether all rewards and weights are valid; it reads `batch_std` under Scale::batch only.
#define RADDPO_DECLARE(T)                                                                                             \
  double batch_std(const GroupAdvantagesArgs<T>& a);                                                                  \
  bool group_advantages(const GroupAdvantagesArgs<T>& a, const GroupScratch& m, double batch_std, std::int64_t begin, \
                        std::int64_t end);
#define RADDPO_GROUP_ADVANTAGES(isa) \
  namespace isa {                    \
  RADDPO_DECLARE(float)              \
  RADDPO_DECLARE(double)             \
  }
RADDPO_GROUP_ADVANTAGES(scalar)
RADDPO_GROUP_ADVANTAGES(avx2)
RADDPO_GROUP_ADVANTAGES(avx512)
#undef RADDPO_GROUP_ADVANTAGES
#undef RADDPO_DECLARE

}  // namespace raddpo
