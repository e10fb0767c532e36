#pragma once
// Kernel interface of assign_balanced: each row takes its nearest code that has room, in the order of the rows; ties go
// to the lower code.
#include <cstdint>

namespace raddpo {

struct AssignBalancedArgs {
  std::int64_t rows, codes;
  const float* distances;      // [rows, codes], no NaN
  const std::int64_t* groups;  // [rows] in [0, number of groups), or null: all rows are of group 0
  std::int32_t* room;          // [groups, codes]: how many more rows each code takes
  std::int64_t* assigned;      // [rows]; -1 where no code of the row's group has room
};

namespace scalar {
void assign_balanced(const AssignBalancedArgs& a);
}
namespace avx2 {
void assign_balanced(const AssignBalancedArgs& a);
}
namespace avx512 {
void assign_balanced(const AssignBalancedArgs& a);
}

}  // namespace raddpo
