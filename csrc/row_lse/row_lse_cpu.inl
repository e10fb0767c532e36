#include "../common/log_sum_exp.inl"

namespace raddpo::RADDPO_ISA {
namespace {

template <typename D>
RADDPO_HD void run(const RowLseArgs& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    RowSum s;
    add_row<D>(s, static_cast<const typename D::T*>(a.logits) + row * a.cols, a.cols);
    a.out[row] = log_sum_exp(s);
  }
}

}  // namespace

void row_lse(const RowLseArgs& a, std::int64_t begin, std::int64_t end) {
  if (a.logit_type == LogitType::float32)
    run<Float32>(a, begin, end);
  else if (a.logit_type == LogitType::bfloat16)
    run<BFloat16>(a, begin, end);
  else
    run<Float16>(a, begin, end);
}

}  // namespace raddpo::RADDPO_ISA
