// The gradient of a row's log-sum-exp. Part of a per-instruction-set region, after log_sum_exp.inl.
namespace raddpo::RADDPO_ISA {
namespace {

RADDPO_HD float exp_or_zero(float x) { return fast_exp(x) - 0x1p-126f; }
RADDPO_HD double exp_or_zero(double x) { return fast_exp(x); }

// Writes y = -g * softmax for a run of columns. In place too: a logit is read before it is overwritten.
template <typename D>
RADDPO_HD void write_softmax(const typename D::T* x, std::int64_t n, typename D::A g, RoundedLse<typename D::A> lse,
                             typename D::T* y) {
  g *= lse.factor;
  constexpr std::int64_t kAhead = 4096 / sizeof(typename D::T);
  for (std::int64_t begin = 0; begin < n; begin += kLseBlock) {
    const std::int64_t size = n - begin < kLseBlock ? n - begin : kLseBlock, words = size / D::kLanes;
    for (std::int64_t i = 0; i < size; i += 64 / sizeof(typename D::T)) __builtin_prefetch(x + begin + kAhead + i);
#pragma omp simd
    for (std::int64_t i = 0; i < words; ++i) {
      const typename D::Word word = D::load_word(x + begin + i * D::kLanes);
      typename D::A out[D::kLanes];
      for (int k = 0; k < D::kLanes; ++k) out[k] = -g * exp_or_zero(D::lane(word, k) - lse.value);
      D::store_word(y + begin + i * D::kLanes, out);
    }
    for (std::int64_t i = begin + words * D::kLanes; i < begin + size; ++i)
      D::store(y + i, -g * exp_or_zero(D::load(x + i) - lse.value));
  }
}

}  // namespace
}  // namespace raddpo::RADDPO_ISA
