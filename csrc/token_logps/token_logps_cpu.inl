// token_logps on one thread. Forward reads a row once for its log-sum-exp. Backward reads and writes it once, with the
// softmax as e^(x - lse). Rows without a gradient are not read.
#include "../common/log_sum_exp.inl"
#include "../common/softmax.inl"

namespace raddpo::RADDPO_ISA {
namespace {

enum class Transform : int { none, scale, softcap };

// A row of logits and their transform.
template <typename D, Transform transform>
struct Row {
  using T = typename D::T;
  using A = typename D::A;
  const T* x;
  A scale, softcap;

  // Rounded before anything is subtracted. If scaling and subtraction were contracted into one operation, z - max(z)
  // would be the rounding error of the maximum, which is in the millions for large z.
  RADDPO_HD A at(std::int64_t i) const {
    if (transform == Transform::none) return D::load(x + i);
    volatile A z = transformed(D::load(x + i));
    return z;
  }
  RADDPO_HD A transformed(A value) const {
    if (transform == Transform::none) return value;
    return scale * (transform == Transform::softcap ? softcap * fast_tanh(value / softcap) : value);
  }
  // The derivative of the transform at the value that it takes to z.
  RADDPO_HD A derivative(A z) const {
    if (transform == Transform::none) return A(1);
    const A t = transform == Transform::softcap ? z / (scale * softcap) : A(0);
    return scale * (A(1) - t * t);
  }
};

// The columns of a row's support: a run of consecutive columns, or a list.
struct Run {
  std::int64_t first, count;
  RADDPO_HD std::int64_t at(std::int64_t i) const { return first + i; }
};
struct List {
  const std::int32_t* columns;
  std::int64_t count;
  RADDPO_HD std::int64_t at(std::int64_t i) const { return columns[i]; }
};

template <typename D, Transform transform, typename Support>
RADDPO_HD double log_sum_exp(const Row<D, transform> row, const Support support) {
  if constexpr (sizeof(typename D::A) == 8) {
    double most = -INFINITY, sum = 0.;
    for (std::int64_t i = 0; i < support.count; ++i) {
      const double z = row.at(support.at(i));
      most = z > most ? z : most;
    }
    const double shift = most == -INFINITY ? 0. : most;  // all -inf or NaN
    for (std::int64_t i = 0; i < support.count; ++i) sum += fast_exp(row.at(support.at(i)) - shift);
    return sum == 0. ? -INFINITY : shift + std::log(sum);
  } else {
    RowSum s;
    float block[kLseBlock];
    for (std::int64_t begin = 0; begin < support.count; begin += kLseBlock) {
      const std::int64_t n = support.count - begin < kLseBlock ? support.count - begin : kLseBlock;
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) block[i] = row.transformed(D::load(row.x + support.at(begin + i)));
      add_block<Float32>(s, block, n);
    }
    return log_sum_exp(s);
  }
}

template <typename D>
RADDPO_HD double log_sum_exp(const Row<D, Transform::none> row, const Run run) {
  if constexpr (sizeof(typename D::A) == 8) {
    return log_sum_exp<D, Transform::none, Run>(row, run);
  } else {
    RowSum s;
    add_row<D>(s, row.x + run.first, run.count);
    return log_sum_exp(s);
  }
}

// Writes y[column] = -g * softmax for a run of columns.
template <typename D, Transform transform>
RADDPO_HD void write_softmax(const Row<D, transform> row, const Run run, typename D::A g, RoundedLse<typename D::A> lse,
                             typename D::T* y) {
  using A = typename D::A;
  const typename D::T* x = row.x;
  if (transform == Transform::none) return write_softmax<D>(x + run.first, run.count, g, lse, y + run.first);
  g *= lse.factor;
  for (std::int64_t begin = run.first; begin < run.first + run.count; begin += kLseBlock) {
    const std::int64_t rest = run.first + run.count - begin, n = rest < kLseBlock ? rest : kLseBlock;
    A z[kLseBlock];
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) z[i] = row.transformed(D::load(x + begin + i));
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i)
      D::store(y + begin + i, -g * exp_or_zero(z[i] - lse.value) * row.derivative(z[i]));
  }
}

template <typename T>
RADDPO_HD void fill_zero(T* y, std::int64_t begin, std::int64_t end) {
  if (end > begin) std::memset(y + begin, 0, (end - begin) * sizeof(T));
}

// Writes the gradient of columns [begin, end) of a row whose softmax runs over all columns.
template <typename D, Transform transform>
RADDPO_HD void write_gradient(const Row<D, transform>& row, std::int64_t begin, std::int64_t end, std::int64_t target,
                              typename D::A g, RoundedLse<typename D::A> lse, typename D::T* y) {
  using A = typename D::A;
  const bool here = target >= begin && target < end;
  const A z = here ? row.at(target) : A(0);  // read before it is overwritten in place
  write_softmax<D, transform>(row, {begin, end - begin}, g, lse, y);
  if (here) D::store(y + target, g * (A(1) - lse.factor * exp_or_zero(z - lse.value)) * row.derivative(z));
}

// Writes the gradient of a row whose softmax runs over a list of columns. The list is ascending, so that in place too a
// logit is read before it is overwritten.
template <typename D, Transform transform>
RADDPO_HD void write_gradient(const Row<D, transform>& row, const List& list, std::int64_t cols, std::int64_t target,
                              typename D::A g, RoundedLse<typename D::A> lse, typename D::T* y) {
  using A = typename D::A;
  std::int64_t done = 0;
  for (std::int64_t i = 0; i < list.count; ++i) {
    const std::int64_t column = list.columns[i];
    const A z = row.at(column), p = lse.factor * exp_or_zero(z - lse.value);
    fill_zero(y, done, column);
    D::store(y + column, g * ((column == target ? A(1) : A(0)) - p) * row.derivative(z));
    done = column + 1;
  }
  fill_zero(y, done, cols);
}

template <typename D, Transform transform>
struct Kernel {
  using T = typename D::T;
  using A = typename D::A;
  const TokenLogpsArgs& a;

  static RADDPO_HD std::int64_t place(const RowStrides& s, std::int64_t inner, std::int64_t row) {
    return row / inner * s.outer + row % inner * s.inner;
  }
  RADDPO_HD Row<D, transform> row_at(std::int64_t row) const {
    return {static_cast<const T*>(a.logits) + place(a.strides, a.inner, row), A(a.scale), A(a.softcap)};
  }
  RADDPO_HD List list_at(std::int64_t row) const { return {a.columns + a.begin[row], a.count[row]}; }
  static RADDPO_HD bool is_run(const List& list) {
    return list.count > 0 && list.columns[list.count - 1] - list.columns[0] == list.count - 1;
  }
  RADDPO_HD A grad_of(std::int64_t row) const { return static_cast<const A*>(a.grad)[row]; }

  RADDPO_HD void forward(std::int64_t row) const {
    const std::int64_t target = target_column(a, row);
    double logp = target == kIgnored ? 0. : -INFINITY, lse = 0.;
    if (target != kIgnored && target != kOutside) {
      const Row<D, transform> logits = row_at(row);
      if (!a.columns) {
        lse = log_sum_exp(logits, Run{0, a.cols});
      } else {
        const List list = list_at(row);
        lse = is_run(list) ? log_sum_exp(logits, Run{list.columns[0], list.count}) : log_sum_exp(logits, list);
      }
      if (target >= 0 && lse != -INFINITY) {
        logp = logits.at(target) - lse;
        logp = logp > 0. ? 0. : logp;
      }
    }
    static_cast<A*>(a.logps)[row] = static_cast<A>(logp);
    a.lse[row] = lse;
  }

  RADDPO_HD void backward(std::int64_t row, std::int64_t begin, std::int64_t end, T* y) const {
    const A g = grad_of(row);
    const std::int64_t target = target_column(a, row);
    if (g == A(0) || target == kIgnored || target == kOutside || a.lse[row] == -INFINITY)
      return fill_zero(y, begin, end);
    const Row<D, transform> logits = row_at(row);
    const RoundedLse<A> lse(a.lse[row]);
    if (!a.columns) return write_gradient<D, transform>(logits, begin, end, target, g, lse, y);
    const List list = list_at(row);
    if (!is_run(list)) return write_gradient<D, transform>(logits, list, a.cols, target, g, lse, y);
    const std::int64_t first = list.columns[0], last = first + list.count;
    write_gradient<D, transform>(logits, first, last, target, g, lse, y);
    fill_zero(y, 0, first);
    fill_zero(y, last, a.cols);
  }

  void forward_rows(std::int64_t begin, std::int64_t end) const {
    for (std::int64_t row = begin; row < end; ++row) forward(row);
  }
  void backward_rows(std::int64_t begin, std::int64_t end) const {
    for (std::int64_t row = begin; row < end; ++row)
      backward(row, 0, a.cols, static_cast<T*>(a.grad_logits) + place(a.grad_strides, a.inner, row));
  }
  // Row k is written over a row that is no longer needed, so rows are handled in order; threads divide the columns.
  void backward_live(std::int64_t begin, std::int64_t end) const {
    for (std::int64_t k = 0; k < a.num_live; ++k)
      backward(a.live[k], begin, end, static_cast<T*>(a.grad_logits) + k * a.grad_strides.inner);
  }
};

template <typename D, typename Body>
RADDPO_HD void with_transform(const TokenLogpsArgs& a, Body body) {
  if (a.softcap != 0.) return body(Kernel<D, Transform::softcap>{a});
  if (a.scale != 1.) return body(Kernel<D, Transform::scale>{a});
  body(Kernel<D, Transform::none>{a});
}

template <typename Body>
RADDPO_HD void with_kernel(const TokenLogpsArgs& a, Body body) {
  if (a.type == LogitType::float32) return with_transform<Float32>(a, body);
  if (a.type == LogitType::bfloat16) return with_transform<BFloat16>(a, body);
  if (a.type == LogitType::float16) return with_transform<Float16>(a, body);
  with_transform<Float64>(a, body);
}

}  // namespace

void token_logps(const TokenLogpsArgs& a, std::int64_t begin, std::int64_t end) {
  with_kernel(a, [=](const auto& kernel) { kernel.forward_rows(begin, end); });
}
void token_logps_backward(const TokenLogpsArgs& a, std::int64_t begin, std::int64_t end) {
  with_kernel(a, [=](const auto& kernel) { kernel.backward_rows(begin, end); });
}
void token_logps_backward_live(const TokenLogpsArgs& a, std::int64_t begin, std::int64_t end) {
  with_kernel(a, [=](const auto& kernel) { kernel.backward_live(begin, end); });
}

}  // namespace raddpo::RADDPO_ISA
