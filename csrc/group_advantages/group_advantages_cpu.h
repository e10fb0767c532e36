#pragma once
// The CPU kernels of group_advantages, one variant per instruction set.
#include "group_advantages.h"

namespace raddpo {

// A row that counts.
struct GroupRow {
  Sid sid;
  std::int64_t row;
  double reward, weight;
  double sequence;  // its advantage as a whole
};

// A row's place among those that count, and its first token.
struct GroupPlace {
  std::int64_t token, row;
};

// A thread's scratch memory, reused from group to group.
struct GroupScratch {
  GroupRow *rows, *sorted;  // [rows of a group]
  GroupPlace* places;       // [2, rows]
  std::int64_t* children;   // [rows + 1] first rows of a prefix's children, and their end
  std::int32_t* shared;     // [rows] tokens that a sorted row has in common with the one before
  double* scores;           // [rows, levels]
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
