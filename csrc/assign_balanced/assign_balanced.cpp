// assign_balanced for torch. Catalogues are encoded on the CPU, so it runs there only.
#include "assign_balanced.h"

#include "../common/isa.h"
#include "../common/tensor.h"

namespace raddpo {
namespace {

Tensor assign_balanced_cpu(const Tensor& distances, Tensor room, const OptionalTensor& groups) {
  constexpr const char* op = "assign_balanced";
  check_device(op, {{"distances", distances}, {"room", room}, {"groups", groups}});
  STD_TORCH_CHECK(distances.dim() == 2 && room.dim() == 2 && room.size(1) == distances.size(1) && room.size(0) >= 1, op,
                  ": distances must have shape (rows, codes) and room (groups, codes)");
  AssignBalancedArgs a{};
  a.rows = distances.size(0);
  a.codes = distances.size(1);
  check_tensor(op, "distances", distances, ScalarType::Float, a.rows * a.codes);
  check_tensor(op, "room", room, ScalarType::Int, room.numel());
  a.distances = distances.const_data_ptr<float>();
  a.room = room.mutable_data_ptr<std::int32_t>();
  if (groups) {
    check_tensor(op, "groups", *groups, ScalarType::Long, a.rows);
    a.groups = groups->const_data_ptr<std::int64_t>();
    for (std::int64_t row = 0; row < a.rows; ++row)
      STD_TORCH_CHECK(a.groups[row] >= 0 && a.groups[row] < room.size(0), op, ": groups[", row, "] must be in [0, ",
                      room.size(0), "), got ", a.groups[row]);
  }
  Tensor assigned = new_empty(distances, {a.rows}, ScalarType::Long);
  a.assigned = assigned.mutable_data_ptr<std::int64_t>();
  RADDPO_CALL_ISA(assign_balanced, a);
  return assigned;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) { m.impl("assign_balanced", TORCH_BOX(&assign_balanced_cpu)); }

}  // namespace raddpo
