#pragma once
// Rows of logits of each type, in exactly as much memory as they need, with the values that kernels are to see.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "catalogue.h"
#include "common/logit_type.h"

struct Logits {
  raddpo::LogitType type;
  std::vector<float> values;  // as rounded
  std::unique_ptr<unsigned char[]> memory;

  Logits(raddpo::LogitType logit_type, const std::vector<float>& from) : type(logit_type), values(from) {
    memory.reset(new unsigned char[from.size() * size_of_one()]);
    for (std::size_t i = 0; i < from.size(); ++i) {
      if (type == raddpo::LogitType::float32) {
        std::memcpy(memory.get() + 4 * i, &from[i], 4);
        continue;
      }
      std::uint16_t half;
      if (type == raddpo::LogitType::bfloat16) {
        raddpo::BFloat16::store(&half, from[i]);
        values[i] = raddpo::BFloat16::load(&half);
      } else {
        raddpo::Float16::store(&half, from[i]);
        values[i] = raddpo::Float16::load(&half);
      }
      std::memcpy(memory.get() + 2 * i, &half, 2);
    }
  }

  std::size_t size_of_one() const { return type == raddpo::LogitType::float32 ? 4 : 2; }
};

inline constexpr raddpo::LogitType kLogitTypes[] = {raddpo::LogitType::float32, raddpo::LogitType::bfloat16,
                                                    raddpo::LogitType::float16};

// In double; NaN and infinities by the rules of arithmetic.
inline double log_sum_exp(const std::vector<double>& x) {
  double most = -INFINITY, sum = 0;
  for (double v : x) {
    if (std::isnan(v)) return NAN;
    most = v > most ? v : most;
  }
  if (std::isinf(most)) return most;
  for (double v : x) sum += std::exp(v - most);
  return most + std::log(sum);
}
