// Each row is read once; the few columns of its list are then read again. Part of a per-instruction-set region.
#include "../common/log_sum_exp.inl"
#include "../common/softmax.inl"

namespace raddpo::RADDPO_ISA {
namespace {

template <typename D>
RADDPO_HD double lse_of_row(const typename D::T* x, std::int64_t n) {
  RowSum s;
  add_row<D>(s, x, n);
  return log_sum_exp(s);
}
template <>
RADDPO_HD double lse_of_row<Float64>(const double* x, std::int64_t n) {
  double most = -INFINITY, sum = 0;
  for (std::int64_t j = 0; j < n; ++j) most = x[j] > most ? x[j] : most;
  if (most == -INFINITY) most = 0;
  for (std::int64_t j = 0; j < n; ++j) sum += std::exp(x[j] - most);
  return most + std::log(sum);
}

template <typename D>
RADDPO_HD double lse_of_list(const typename D::T* x, const std::int32_t* columns, std::int64_t n) {
  typename D::A most = -INFINITY;
  for (std::int64_t i = 0; i < n; ++i) {
    const typename D::A z = D::load(x + columns[i]);
    most = z > most ? z : most;
  }
  if (most == -INFINITY) return most;
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += fast_exp(D::load(x + columns[i]) - most);
  return most + std::log(sum);
}

template <typename D>
RADDPO_HD void forward(const LegalMassArgs& a, std::int64_t begin, std::int64_t end) {
  using A = typename D::A;
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* x = static_cast<const typename D::T*>(a.logits) + row * a.cols;
    const double all = lse_of_row<D>(x, a.cols), listed = lse_of_list<D>(x, a.columns + a.begin[row], a.count[row]);
    const double mass = listed == -INFINITY && all == all ? listed : listed - all;
    static_cast<A*>(a.mass)[row] = static_cast<A>(mass > 0 ? 0 : mass);
    a.lse[row] = all;
    a.lse[a.rows + row] = listed;
  }
}

template <typename D>
RADDPO_HD void backward(const LegalMassArgs& a, std::int64_t begin, std::int64_t end) {
  using A = typename D::A;
  for (std::int64_t row = begin; row < end; ++row) {
    const auto* x = static_cast<const typename D::T*>(a.logits) + row * a.cols;
    auto* y = static_cast<typename D::T*>(a.grad_logits) + row * a.cols;
    const A g = static_cast<const A*>(a.grad)[row];
    const RoundedLse<A> all(a.lse[row]), listed(a.lse[a.rows + row]);
    if (g == 0 || listed.value == -INFINITY) {
      for (std::int64_t j = 0; j < a.cols; ++j) y[j] = 0;
      continue;
    }
    write_softmax<D>(x, a.cols, g, all, y);
    for (std::int64_t i = a.begin[row]; i < a.begin[row] + a.count[row]; ++i) {
      const A z = D::load(x + a.columns[i]);
      D::store(y + a.columns[i],
               g * (listed.factor * exp_or_zero(z - listed.value) - all.factor * exp_or_zero(z - all.value)));
    }
  }
}

template <typename Body>
RADDPO_HD void with_type(const LegalMassArgs& a, Body body) {
  if (a.type == LogitType::float32) return body(Float32{});
  if (a.type == LogitType::bfloat16) return body(BFloat16{});
  if (a.type == LogitType::float16) return body(Float16{});
  body(Float64{});
}

}  // namespace

void legal_mass(const LegalMassArgs& a, std::int64_t begin, std::int64_t end) {
  with_type(a, [&](auto type) { forward<decltype(type)>(a, begin, end); });
}
void legal_mass_backward(const LegalMassArgs& a, std::int64_t begin, std::int64_t end) {
  with_type(a, [&](auto type) { backward<decltype(type)>(a, begin, end); });
}

}  // namespace raddpo::RADDPO_ISA
