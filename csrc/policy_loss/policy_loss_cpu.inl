// One group at a time on one thread. Part of a per-instruction-set region.
namespace raddpo::RADDPO_ISA {
namespace {

template <typename T>
RADDPO_HD PolicySums run_group(const PolicyLossArgs<T>& a, std::int64_t s) {
  const Session v = session_of(a.batch, s);
  const std::int64_t size = v.positives + v.negatives;
  bool counts = a.count_all;
  for (std::int64_t i = 0; i < size && !counts; ++i) counts = has_advantage(a, v, i);
  PolicySums sums{};
  for (std::int64_t i = 0; i < size; ++i) add_row(a, v, i, counts, sums);
  write_group(a, s, counts, sums);
  return sums;
}

template <typename T>
RADDPO_HD void run(const PolicyLossArgs<T>& a, std::int64_t begin, std::int64_t end, PolicySums* sums) {
  for (std::int64_t s = begin; s < end; ++s) sums[s] = run_group(a, s);
}

template <typename T>
RADDPO_HD void run(const PolicyLossBackwardArgs<T>& a, std::int64_t begin, std::int64_t end) {
  for (std::int64_t s = begin; s < end; ++s) {
    const Session v = session_of(a.batch, s);
    for (std::int64_t i = 0; i < v.positives + v.negatives; ++i)
      for (std::int64_t l = 0; l < a.levels; ++l)
        a.grad_logps[(v.first + i) * a.levels + l] = gradient_of(a, v, s, i, l);
  }
}

}  // namespace

#define RADDPO_DEFINE(T)                                                                                 \
  void policy_loss(const PolicyLossArgs<T>& a, std::int64_t begin, std::int64_t end, PolicySums* sums) { \
    run(a, begin, end, sums);                                                                            \
  }                                                                                                      \
  void policy_loss_backward(const PolicyLossBackwardArgs<T>& a, std::int64_t begin, std::int64_t end) {  \
    run(a, begin, end);                                                                                  \
  }
RADDPO_DEFINE(float)
RADDPO_DEFINE(double)
#undef RADDPO_DEFINE

}  // namespace raddpo::RADDPO_ISA
