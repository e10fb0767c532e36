// token_logps on one thread. Forward: the log-sum-exp of a row in one read. Backward: one read and one write, with the
// softmax as e^(x - lse). Rows without a gradient are not read.
#include "../common/log_sum_exp.inl"

namespace raddpo::RADDPO_ISA {
namespace {

enum class Map : int { none, scale, softcap };

// A row of logits as the softmax sees it.
template <typename D, Map map>
struct Row {
  using T = typename D::T;
  using A = typename D::A;
  const T* x;
  A scale, softcap;

  // Rounded before anything is subtracted from it. Contracted into one operation, z - max(z) would be what the
  // maximum's own rounding took away, which is millions for large z.
  RADDPO_HD A at(std::int64_t i) const {
    if (map == Map::none) return D::load(x + i);
    volatile A z = mapped(D::load(x + i));
    return z;
  }
  RADDPO_HD A mapped(A value) const {
    if (map == Map::none) return value;
    return scale * (map == Map::softcap ? softcap * fast_tanh(value / softcap) : value);
  }
  // d mapped / d value, where mapped = z.
  RADDPO_HD A slope(A z) const {
    if (map == Map::none) return A(1);
    const A t = map == Map::softcap ? z / (scale * softcap) : A(0);
    return scale * (A(1) - t * t);
  }
};

// The columns of a row's support: one after another, or listed.
struct Run {
  std::int64_t first, count;
  RADDPO_HD std::int64_t at(std::int64_t i) const { return first + i; }
};
struct List {
  const std::int32_t* columns;
  std::int64_t count;
  RADDPO_HD std::int64_t at(std::int64_t i) const { return columns[i]; }
};

RADDPO_HD float exp_or_zero(float x) { return fast_exp(x) - 0x1p-126f; }
RADDPO_HD double exp_or_zero(double x) { return fast_exp(x); }

template <typename D, Map map, typename Support>
RADDPO_HD double log_sum_exp(const Row<D, map> row, const Support support) {
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
      for (std::int64_t i = 0; i < n; ++i) block[i] = row.mapped(D::load(row.x + support.at(begin + i)));
      add_block<Float32>(s, block, n);
    }
    return log_sum_exp(s);
  }
}

template <typename D>
RADDPO_HD double log_sum_exp(const Row<D, Map::none> row, const Run run) {
  if constexpr (sizeof(typename D::A) == 8) {
    return log_sum_exp<D, Map::none, Run>(row, run);
  } else {
    RowSum s;
    add_row<D>(s, row.x + run.first, run.count);
    return log_sum_exp(s);
  }
}

// y[column] = -g * softmax over a run of columns.
template <typename D, Map map>
RADDPO_HD void write_softmax(const Row<D, map> row, const Run run, typename D::A g, typename D::A lse,
                             typename D::T* y) {
  using A = typename D::A;
  constexpr std::int64_t kAhead = 4096 / sizeof(typename D::T);
  const typename D::T* x = row.x;
  for (std::int64_t begin = run.first; begin < run.first + run.count; begin += kLseBlock) {
    const std::int64_t rest = run.first + run.count - begin, n = rest < kLseBlock ? rest : kLseBlock;
    for (std::int64_t i = 0; i < n; i += 64 / sizeof(typename D::T)) __builtin_prefetch(x + begin + kAhead + i);
    if (map != Map::none) {
      A z[kLseBlock];
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) z[i] = row.mapped(D::load(x + begin + i));
#pragma omp simd
      for (std::int64_t i = 0; i < n; ++i) D::store(y + begin + i, -g * exp_or_zero(z[i] - lse) * row.slope(z[i]));
      continue;
    }
    const std::int64_t words = n / D::kLanes;
#pragma omp simd
    for (std::int64_t i = 0; i < words; ++i) {
      const typename D::Word word = D::load_word(x + begin + i * D::kLanes);
      A out[D::kLanes];
      for (int k = 0; k < D::kLanes; ++k) out[k] = -g * exp_or_zero(D::lane(word, k) - lse);
      D::store_word(y + begin + i * D::kLanes, out);
    }
    for (std::int64_t i = begin + words * D::kLanes; i < begin + n; ++i)
      D::store(y + i, -g * exp_or_zero(D::load(x + i) - lse));
  }
}

template <typename T>
RADDPO_HD void fill_zero(T* y, std::int64_t begin, std::int64_t end) {
  if (end > begin) std::memset(y + begin, 0, (end - begin) * sizeof(T));
}

// The gradient of columns [begin, end) of a row whose softmax runs over all columns.
template <typename D, Map map>
RADDPO_HD void write_gradient(const Row<D, map>& row, std::int64_t begin, std::int64_t end, std::int64_t target,
                              typename D::A g, typename D::A lse, typename D::T* y) {
  using A = typename D::A;
  const bool here = target >= begin && target < end;
  const A z = here ? row.at(target) : A(0);  // read before it is overwritten in place
  write_softmax<D, map>(row, {begin, end - begin}, g, lse, y);
  if (here) D::store(y + target, g * (A(1) - exp_or_zero(z - lse)) * row.slope(z));
}

// The gradient of a row whose softmax runs over listed columns. They ascend, so that a logit is read before its place
// is written, in place too.
template <typename D, Map map>
RADDPO_HD void write_gradient(const Row<D, map>& row, const List& list, std::int64_t cols, std::int64_t target,
                              typename D::A g, typename D::A lse, typename D::T* y) {
  using A = typename D::A;
  std::int64_t done = 0;
  for (std::int64_t i = 0; i < list.count; ++i) {
    const std::int64_t column = list.columns[i];
    const A z = row.at(column), p = exp_or_zero(z - lse);
    fill_zero(y, done, column);
    D::store(y + column, g * ((column == target ? A(1) : A(0)) - p) * row.slope(z));
    done = column + 1;
  }
  fill_zero(y, done, cols);
}

template <typename D, Map map>
struct Kernel {
  using T = typename D::T;
  using A = typename D::A;
  const TokenLogpsArgs& a;

  static RADDPO_HD std::int64_t place(const RowStrides& s, std::int64_t inner, std::int64_t row) {
    return row / inner * s.outer + row % inner * s.inner;
  }
  RADDPO_HD Row<D, map> row_at(std::int64_t row) const {
    return {static_cast<const T*>(a.logits) + place(a.strides, a.inner, row), A(a.scale), A(a.softcap)};
  }
  RADDPO_HD List list_at(std::int64_t row) const { return {a.columns + a.begin[row], a.count[row]}; }
  static RADDPO_HD bool is_run(const List& list) {
    return list.count > 0 && list.columns[list.count - 1] - list.columns[0] == list.count - 1;
  }
  RADDPO_HD A grad_of(std::int64_t row) const { return static_cast<const A*>(a.grad)[row]; }
  RADDPO_HD A lse_of(std::int64_t row) const { return static_cast<const A*>(a.lse)[row]; }

  RADDPO_HD void forward(std::int64_t row) const {
    const std::int64_t target = target_column(a, row);
    double logp = target == kIgnored ? 0. : -INFINITY, lse = 0.;
    if (target != kIgnored && target != kOutside) {
      const Row<D, map> logits = row_at(row);
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
    static_cast<A*>(a.lse)[row] = static_cast<A>(lse);
  }

  RADDPO_HD void backward(std::int64_t row, std::int64_t begin, std::int64_t end, T* y) const {
    const A g = grad_of(row), lse = lse_of(row);
    const std::int64_t target = target_column(a, row);
    if (g == A(0) || target == kIgnored || target == kOutside || lse == -INFINITY) return fill_zero(y, begin, end);
    const Row<D, map> logits = row_at(row);
    if (!a.columns) return write_gradient<D, map>(logits, begin, end, target, g, lse, y);
    const List list = list_at(row);
    if (!is_run(list)) return write_gradient<D, map>(logits, list, a.cols, target, g, lse, y);
    const std::int64_t first = list.columns[0], last = first + list.count;
    write_gradient<D, map>(logits, first, last, target, g, lse, y);
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
  // Row after row, as row k is written over one that is no longer needed: threads share out the columns.
  void backward_live(std::int64_t begin, std::int64_t end) const {
    for (std::int64_t k = 0; k < a.num_live; ++k)
      backward(a.live[k], begin, end, static_cast<T*>(a.grad_logits) + k * a.grad_strides.inner);
  }
};

template <typename D, typename Body>
RADDPO_HD void with_map(const TokenLogpsArgs& a, Body body) {
  if (a.softcap != 0.) return body(Kernel<D, Map::softcap>{a});
  if (a.scale != 1.) return body(Kernel<D, Map::scale>{a});
  body(Kernel<D, Map::none>{a});
}

template <typename Body>
RADDPO_HD void with_kernel(const TokenLogpsArgs& a, Body body) {
  if (a.type == LogitType::float32) return with_map<Float32>(a, body);
  if (a.type == LogitType::bfloat16) return with_map<BFloat16>(a, body);
  if (a.type == LogitType::float16) return with_map<Float16>(a, body);
  with_map<Float64>(a, body);
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
