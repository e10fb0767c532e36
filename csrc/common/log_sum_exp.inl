// Row log-sum-exp on one thread, reading each element once from memory. Part of a per-instruction-set region.
namespace raddpo::RADDPO_ISA {
namespace {

constexpr std::int64_t kLseBlock = 1024;

// Adds n elements. The exponentials are shifted by a maximum found earlier, so that one loop does for both the sum and
// the next maximum; only a block that tops the shift by more than e^60 is summed again.
template <typename D>
RADDPO_HD void add_block(LogSumExp& s, const typename D::T* x, std::int64_t n) {
  float most = -INFINITY;
  if (s.max == -INFINITY) {
#pragma omp simd reduction(max : most)
    for (std::int64_t i = 0; i < n; ++i) {
      const float v = D::load(x + i);
      most = v > most ? v : most;
    }
    s.max = most;
  }
  for (;;) {
    const float shift = s.max == -INFINITY ? 0.f : s.max;  // all -inf or NaN so far: find which
    float sum = 0.f;
    most = -INFINITY;
#pragma omp simd reduction(+ : sum) reduction(max : most)
    for (std::int64_t i = 0; i < n; ++i) {
      const float v = D::load(x + i);
      most = v > most ? v : most;
      sum += fast_exp(v - shift);
    }
    if (s.max == -INFINITY) {
      s.sum = sum == sum ? 0.f : sum;
      return;
    }
    if (most <= shift + 60.f) {
      s.sum += sum;
      return;
    }
    s.sum *= fast_exp(shift - most);
    s.max = most;
    if (most == INFINITY) {
      s.sum = NAN;
      return;
    }
  }
}

template <typename D>
RADDPO_HD void add_row(LogSumExp& s, const typename D::T* x, std::int64_t n) {
  for (std::int64_t begin = 0; begin < n; begin += kLseBlock) {
    const std::int64_t size = n - begin < kLseBlock ? n - begin : kLseBlock;
    // The hardware prefetcher stops at page borders; the block after next may be the next row's.
    for (std::int64_t ahead = 0; ahead < kLseBlock; ahead += 64 / sizeof(typename D::T))
      __builtin_prefetch(x + begin + kLseBlock + ahead);
    add_block<D>(s, x + begin, size);
  }
}

RADDPO_HD float value_of(const LogSumExp& s) { return s.sum == 0.f ? -INFINITY : s.max + std::log(s.sum); }

}  // namespace
}  // namespace raddpo::RADDPO_ISA
