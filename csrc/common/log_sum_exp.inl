// Row log-sum-exp on one thread, reading each element once from memory. Part of a per-instruction-set region.
namespace raddpo::RADDPO_ISA {
namespace {

constexpr std::int64_t kLseBlock = 1024;
constexpr std::int64_t kSample = 64;  // elements whose maximum is a row's first shift

// Sum of e^(x - shift) over the elements so far; shift -INFINITY: none above -inf yet.
struct RowSum {
  float shift = -INFINITY, sum = 0.f;
};

// The maximum of n elements, -INFINITY without one above. Four at a time: each waits for the one before it.
template <typename D>
RADDPO_HD float max_of(const typename D::T* x, std::int64_t n) {
  const std::int64_t quarter = n / 4;
  float m0 = -INFINITY, m1 = -INFINITY, m2 = -INFINITY, m3 = -INFINITY;
#pragma omp simd reduction(max : m0, m1, m2, m3)
  for (std::int64_t i = 0; i < quarter; ++i) {
    const float v0 = D::load(x + i), v1 = D::load(x + quarter + i);
    const float v2 = D::load(x + 2 * quarter + i), v3 = D::load(x + 3 * quarter + i);
    m0 = v0 > m0 ? v0 : m0;
    m1 = v1 > m1 ? v1 : m1;
    m2 = v2 > m2 ? v2 : m2;
    m3 = v3 > m3 ? v3 : m3;
  }
  for (std::int64_t i = 4 * quarter; i < n; ++i) {
    const float v = D::load(x + i);
    m0 = v > m0 ? v : m0;
  }
  m0 = m1 > m0 ? m1 : m0;
  m2 = m3 > m2 ? m3 : m2;
  return m2 > m0 ? m2 : m0;
}

// Adds n elements, a number of whole words. The shift is a maximum found earlier, or of a sample, so that one loop does
// for both the sum and the next maximum; only a block that tops it by more than 60 is summed again, shifted by its own
// maximum.
template <typename D>
RADDPO_HD void add_words(RowSum& s, const typename D::T* x, std::int64_t n) {
  float most = -INFINITY;
  if (s.shift == -INFINITY) s.shift = max_of<D>(x, n < kSample ? n : kSample);
  if (s.shift == -INFINITY) s.shift = max_of<D>(x, n);
  for (;;) {
    const float shift = s.shift == -INFINITY ? 0.f : s.shift;  // all -inf or NaN so far: find which
    const float least = least_exponent(shift);
    float sum = 0.f, odd_sum = 0.f, odd_most = -INFINITY;
    most = -INFINITY;
#pragma omp simd reduction(+ : sum, odd_sum) reduction(max : most, odd_most)
    for (std::int64_t i = 0; i < n / D::kLanes; ++i) {
      const typename D::Word word = D::load_word(x + i * D::kLanes);
      const float v = D::lane(word, 0);
      most = v > most ? v : most;
      sum += fast_exp(v - shift, least);  // subtracted first: exact where it matters, whatever the size of the logits
      if (D::kLanes == 2) {
        const float u = D::lane(word, 1);
        odd_most = u > odd_most ? u : odd_most;
        odd_sum += fast_exp(u - shift, least);
      }
    }
    sum += odd_sum;
    most = odd_most > most ? odd_most : most;
    if (s.shift == -INFINITY) {
      s.sum += sum == sum ? 0.f : sum;
      return;
    }
    if (most == INFINITY) {
      s.sum = NAN;
      return;
    }
    if (most <= shift + 60.f) {
      s.sum += sum;
      return;
    }
    s.sum *= fast_exp(shift - most);
    s.shift = most;
  }
}

template <typename D>
RADDPO_HD void add_block(RowSum& s, const typename D::T* x, std::int64_t n) {
  const std::int64_t rest = n % D::kLanes;
  if (n > rest) add_words<D>(s, x, n - rest);
  if (!rest) return;
  const float last = D::load(x + n - 1);
  add_words<Float32>(s, &last, 1);
}

template <typename D>
RADDPO_HD void add_row(RowSum& s, const typename D::T* x, std::int64_t n) {
  for (std::int64_t begin = 0; begin < n; begin += kLseBlock) {
    const std::int64_t size = n - begin < kLseBlock ? n - begin : kLseBlock;
    add_block<D>(s, x + begin, size);
  }
}

RADDPO_HD double log_sum_exp(const RowSum& s) {
  return s.sum == 0.f ? -INFINITY : s.shift + std::log(static_cast<double>(s.sum));
}

}  // namespace
}  // namespace raddpo::RADDPO_ISA
