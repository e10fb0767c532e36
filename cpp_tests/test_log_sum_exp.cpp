// The log-sum-exp of rows, for every instruction set and type, against double.
#include "check.h"
#include "logits.h"
#include "row_lse/row_lse.h"

namespace {

float lse_of(const Logits& logits, std::int64_t cols) {
  float out = 777.f;
  const raddpo::RowLseArgs args{logits.memory.get(), logits.type, 1, cols, &out};
  RADDPO_CALL_ISA(row_lse, args, 0, 1);
  return out;
}

TEST(log_sum_exp_of_finite_rows) {
  for_each_isa([] {
    Random random(0);
    for (raddpo::LogitType type : kLogitTypes)
      for (int cols : {1, 2, 3, 15, 16, 17, 63, 64, 127, 1023, 1024, 1025, 2049, 3000})
        for (float scale : {1.f, 30.f, 1000.f}) {
          std::vector<float> row(cols);
          for (float& x : row) x = scale * (static_cast<float>(random.below(1 << 20)) / (1 << 19) - 1.f);
          const Logits logits(type, row);
          const double expected = log_sum_exp({logits.values.begin(), logits.values.end()});
          const float got = lse_of(logits, cols);
          if (!(std::fabs(got - expected) <= 2e-6 * (1 + std::fabs(expected))))
            fail(__FILE__, __LINE__, "of ", cols, " columns: ", got, ", not ", expected);
        }
  });
}

TEST(log_sum_exp_of_special_values) {
  for_each_isa([] {
    for (raddpo::LogitType type : kLogitTypes)
      for (int cols : {1, 5, 64, 1500})
        for (int at : {0, cols / 2, cols - 1}) {
          std::vector<float> row(cols, -INFINITY);
          CHECK_EQUAL(lse_of(Logits(type, row), cols), -INFINITY);
          row[at] = 2.f;
          CHECK_EQUAL(lse_of(Logits(type, row), cols), 2.f);
          row[at] = NAN;
          CHECK(std::isnan(lse_of(Logits(type, row), cols)));
          row.assign(cols, 1.f);
          row[at] = NAN;
          CHECK(std::isnan(lse_of(Logits(type, row), cols)));
          row[at] = INFINITY;
          CHECK(!std::isfinite(lse_of(Logits(type, row), cols)));
          row[at] = -INFINITY;
          const double expected = cols == 1 ? -INFINITY : 1 + std::log(cols - 1.0);
          CHECK(cols == 1 ? lse_of(Logits(type, row), cols) == expected
                          : std::fabs(lse_of(Logits(type, row), cols) - expected) < 1e-5);
        }
  });
}

}  // namespace
