// Finds the smallest distance block by block, so that only the first block that holds it is searched for its code.
namespace raddpo::RADDPO_ISA {
namespace {

constexpr std::int64_t kBlock = 32;
constexpr float kNone = std::numeric_limits<float>::infinity();

RADDPO_HD float smallest(const float* distances, const std::int32_t* room, std::int64_t codes) {
  float least = kNone;
#pragma omp simd reduction(min : least)
  for (std::int64_t code = 0; code < codes; ++code) {
    const float distance = room[code] > 0 ? distances[code] : kNone;
    least = distance < least ? distance : least;
  }
  return least;
}

// The nearest code with room; `codes` if there is none.
RADDPO_HD std::int64_t nearest(const float* distances, const std::int32_t* room, std::int64_t codes) {
  float best = kNone;
  std::int64_t code = 0;  // no code before it is the nearest
  const std::int64_t whole = codes - codes % kBlock;
  for (std::int64_t begin = 0; begin < codes; begin += kBlock) {
    const float least = begin < whole ? smallest(distances + begin, room + begin, kBlock)
                                      : smallest(distances + begin, room + begin, codes - begin);
    if (least < best) best = least, code = begin;
  }
  while (code < codes && !(room[code] > 0 && distances[code] == best)) ++code;
  return code;
}

}  // namespace

void assign_balanced(const AssignBalancedArgs& a) {
  for (std::int64_t row = 0; row < a.rows; ++row) {
    std::int32_t* room = a.room + (a.groups ? a.groups[row] : 0) * a.codes;
    const std::int64_t code = nearest(a.distances + row * a.codes, room, a.codes);
    a.assigned[row] = code < a.codes ? code : -1;
    if (code < a.codes) --room[code];
  }
}

}  // namespace raddpo::RADDPO_ISA
