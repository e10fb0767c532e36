#pragma once
// Finds the column of a row's target, on host and device.
#include "../common/math.h"
#include "token_logps.h"

namespace raddpo {

constexpr std::int64_t kIgnored = -1;    // log-prob 0, no gradient
constexpr std::int64_t kOutside = -2;    // outside the support: log-prob -inf, no gradient
constexpr std::int64_t kElsewhere = -3;  // a column of the wider row that is not among these logits

RADDPO_HD std::int64_t target_column(const TokenLogpsArgs& a, std::int64_t row) {
  const std::int64_t token = a.targets[row], column = token - a.first_column;
  if (token == a.ignore_index) return kIgnored;
  if (token < 0 || token >= a.vocab_size) return kOutside;
  if (!a.columns) return column >= 0 && column < a.cols ? column : kElsewhere;
  std::int64_t low = a.begin[row], high = low + a.count[row];
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (a.columns[middle] < column)
      low = middle + 1;
    else
      high = middle;
  }
  return low < a.begin[row] + a.count[row] && a.columns[low] == column ? column : kOutside;
}

}  // namespace raddpo
