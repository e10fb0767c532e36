#pragma once
// Each row takes its nearest code that has room, in the order of the rows; ties go to the lower code.
#include <cstdint>
#include <limits>

namespace raddpo {

struct AssignBalancedArgs {
  std::int64_t rows, codes;
  const float* distances;      // [rows, codes], no NaN
  const std::int64_t* groups;  // [rows] in [0, number of groups), or null: all rows are of group 0
  std::int32_t* room;          // [groups, codes]: how many more rows each code takes
  std::int64_t* assigned;      // [rows]; -1 where no code of the row's group has room
};

inline void assign_balanced(const AssignBalancedArgs& a) {
  constexpr float kNone = std::numeric_limits<float>::infinity();
  for (std::int64_t row = 0; row < a.rows; ++row) {
    const float* distances = a.distances + row * a.codes;
    std::int32_t* room = a.room + (a.groups ? a.groups[row] : 0) * a.codes;
    float nearest = kNone;
#pragma omp simd reduction(min : nearest)
    for (std::int64_t code = 0; code < a.codes; ++code) {
      const float distance = room[code] > 0 ? distances[code] : kNone;
      nearest = distance < nearest ? distance : nearest;
    }
    std::int64_t code = 0;
    while (code < a.codes && !(room[code] > 0 && distances[code] == nearest)) ++code;
    a.assigned[row] = code < a.codes ? code : -1;
    if (code < a.codes) --room[code];
  }
}

}  // namespace raddpo
