// policy_loss for torch: checks, allocation, threads and streams.
#include "policy_loss.h"

#include <algorithm>
#include <tuple>

#include "../common/buffer.h"
#include "../common/isa.h"
#include "../common/session_tensors.h"
#include "policy_loss_cpu.h"
#include "policy_loss_math.h"

namespace raddpo {
namespace {

constexpr const char* kOp = "policy_loss";

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The operator's arguments in schema order.
struct Inputs {
  const Tensor &logps, &tokens, &lengths, &offsets, &num_positives, &advantages;
  const OptionalTensor &old_logps, &ref_logps, &weights, &gates, &level_weights, &divisors;
  double row_divisor, token_divisor, low, high, dual_clip, delta, kl_weight, nll_weight, max_length;
  std::int64_t objective, ratio, divergence, aggregate, reduction;
  bool use_experts, protect, count_all, need_gradient;
};

template <typename T>
PolicyLossArgs<T> prepare(const Inputs& in, Result& out) {
  check_device(kOp, {{"logps", in.logps},
                     {"tokens", in.tokens},
                     {"lengths", in.lengths},
                     {"offsets", in.offsets},
                     {"num_positives", in.num_positives},
                     {"advantages", in.advantages},
                     {"old_logps", in.old_logps},
                     {"ref_logps", in.ref_logps},
                     {"weights", in.weights},
                     {"gates", in.gates},
                     {"level_weights", in.level_weights},
                     {"divisors", in.divisors}});
  const ScalarType type = in.logps.scalar_type();
  PolicyLossArgs<T> a{};
  STD_TORCH_CHECK(in.logps.dim() == 2, "policy_loss: logps must have shape (candidates, levels)");
  a.batch = sessions_of(kOp, in.logps.size(0), in.lengths, in.offsets, in.num_positives);
  const std::int64_t candidates = a.batch.candidates, sessions = a.batch.sessions;
  a.levels = in.logps.size(1);
  const std::int64_t size = candidates * a.levels;
  a.by_token = in.advantages.dim() == 2;
  a.tokens = data_of<std::int64_t>(kOp, "tokens", in.tokens, size);
  a.logps = data_of<T>(kOp, "logps", in.logps, size);
  a.advantages = data_of<T>(kOp, "advantages", in.advantages, a.by_token ? size : candidates);
  a.old_logps = data_of<T>(kOp, "old_logps", in.old_logps, size);
  a.ref_logps = data_of<T>(kOp, "ref_logps", in.ref_logps, size);
  a.weights = data_of<T>(kOp, "weights", in.weights, candidates);
  a.gates = data_of<T>(kOp, "gates", in.gates, size);
  a.level_weights = data_of<T>(kOp, "level_weights", in.level_weights, a.levels);
  a.divisors = data_of<double>(kOp, "divisors", in.divisors, 2);
  a.divisor[0] = in.row_divisor;
  a.divisor[1] = in.token_divisor;
  a.low = in.low;
  a.high = in.high;
  a.dual_clip = in.dual_clip;
  a.delta = in.delta;
  a.kl_weight = in.kl_weight;
  a.nll_weight = in.nll_weight;
  a.max_length = in.max_length;
  a.objective = static_cast<Objective>(in.objective);
  a.ratio = static_cast<Ratio>(in.ratio);
  a.divergence = static_cast<Divergence>(in.divergence);
  a.aggregate = static_cast<Aggregate>(in.aggregate);
  a.reduction = static_cast<Reduction>(in.reduction);
  a.use_experts = in.use_experts;
  a.protect = in.protect;
  a.count_all = in.count_all;
  const auto scalar = [&] { return new_empty(in.logps, {}, type); };
  const auto loss = [&] { return a.reduction == Reduction::none ? new_empty(in.logps, {sessions}, type) : scalar(); };
  out = {loss(),
         loss(),
         loss(),
         loss(),
         new_empty(in.logps, {candidates}, type),
         new_empty(in.logps, {2}, type),
         scalar(),
         new_empty(in.logps, {2}, ScalarType::Double),
         new_empty(in.logps, {sessions}, ScalarType::Bool),
         new_empty(in.logps, {in.need_gradient ? candidates : 0, a.levels}, type),
         new_empty(in.logps, {2}, type)};
  auto& [total, policy, kl, nll, ratios, clipped, approx_kl, counts, counted, gradient, scales] = out;
  a.loss = total.template mutable_data_ptr<T>();
  a.policy = policy.template mutable_data_ptr<T>();
  a.kl = kl.template mutable_data_ptr<T>();
  a.nll = nll.template mutable_data_ptr<T>();
  a.ratios = ratios.template mutable_data_ptr<T>();
  a.clipped = clipped.template mutable_data_ptr<T>();
  a.approx_kl = approx_kl.template mutable_data_ptr<T>();
  a.counts = counts.template mutable_data_ptr<double>();
  a.counted = counted.template mutable_data_ptr<bool>();
  a.gradient = in.need_gradient ? gradient.template mutable_data_ptr<T>() : nullptr;
  a.scales = scales.template mutable_data_ptr<T>();
  return a;
}

template <typename T>
void run_cpu(const PolicyLossArgs<T>& a) {
  const std::int64_t sessions = a.batch.sessions;
  const Buffer<PolicySums> sums(sessions);
  const std::int64_t grain = grain_of(a.batch, a.batch.candidates * a.levels, 1 << 12);
  parallel_for(sessions, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t few = std::min(stretch_rows(a.levels), a.batch.candidates);
    const std::int64_t rows = std::max(most_candidates(a.batch, begin, end), few), size = rows * a.levels;
    const Buffer<std::int32_t> integers(2 * rows);
    const Buffer<double> values(6 * rows + 7 * size);
    std::int32_t* const i = integers.get();
    double* rest = values.get();
    const auto take = [&](std::int64_t count) {
      rest += count;
      return rest - count;
    };
    const PolicyLossScratch m{i,          i + rows,   take(rows), take(rows), take(rows),
                              take(rows), take(rows), take(rows), take(size), take(size),
                              take(size), take(size), take(size), take(size), take(size)};
    RADDPO_CALL_ISA(policy_loss, a, m, begin, end, sums.get());
  });
  PolicySums total{};
  for (std::int64_t s = 0; s < sessions; ++s) add(total, sums[s]);
  STD_TORCH_CHECK(total.of[kInvalid] == 0,
                  "policy_loss: advantages times gates must be finite, weights finite and at least 0");
  write_batch(a, total);
}

template <typename T>
void run_cpu(const PolicyLossBackwardArgs<T>& a) {
  parallel_for(a.batch.sessions, grain_of(a.batch, a.batch.candidates * a.levels, 1 << 14),
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(policy_loss_backward, a, begin, end); });
}

#ifdef RADDPO_WITH_CUDA
template <typename T>
void run_cuda(const PolicyLossArgs<T>& a, const Tensor& logps) {
  Tensor workspace = new_empty(logps, {cuda::policy_loss_workspace(a)}, ScalarType::Byte);
  check_launch(cuda::policy_loss(a, workspace.mutable_data_ptr(), current_cuda_stream(logps.get_device_index())),
               "policy_loss");
}

template <typename T>
void run_cuda(const PolicyLossBackwardArgs<T>& a, const Tensor& logps) {
  check_launch(cuda::policy_loss_backward(a, current_cuda_stream(logps.get_device_index())), "policy_loss_backward");
}
#endif

template <typename Args>
void run(const Args& a, const Tensor& logps) {
#ifdef RADDPO_WITH_CUDA
  if (logps.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(logps.get_device_index());
    run_cuda(a, logps);
    return;
  }
#endif
  run_cpu(a);
}

Result policy_loss(const Tensor& logps, const Tensor& tokens, const Tensor& lengths, const Tensor& offsets,
                   const Tensor& num_positives, const Tensor& advantages, const OptionalTensor& old_logps,
                   const OptionalTensor& ref_logps, const OptionalTensor& weights, const OptionalTensor& gates,
                   const OptionalTensor& level_weights, const OptionalTensor& divisors, double row_divisor,
                   double token_divisor, double low, double high, double dual_clip, double delta, double kl_weight,
                   double nll_weight, double max_length, std::int64_t objective, std::int64_t ratio,
                   std::int64_t divergence, std::int64_t aggregate, std::int64_t reduction, bool use_experts,
                   bool protect, bool count_all, bool need_gradient) {
  const Inputs in{logps,     tokens,    lengths,       offsets,    num_positives, advantages,    old_logps, ref_logps,
                  weights,   gates,     level_weights, divisors,   row_divisor,   token_divisor, low,       high,
                  dual_clip, delta,     kl_weight,     nll_weight, max_length,    objective,     ratio,     divergence,
                  aggregate, reduction, use_experts,   protect,    count_all,     need_gradient};
  Result out;
  if (is_float32(kOp, "logps", logps))
    run(prepare<float>(in, out), logps);
  else
    run(prepare<double>(in, out), logps);
  return out;
}

template <typename T>
Tensor backward(const Tensor& grad_loss, const Tensor& logps, const Tensor& gradient, const Tensor& scales,
                const Tensor& counted, const Tensor& lengths, const Tensor& offsets, const Tensor& num_positives,
                const OptionalTensor& level_weights, double nll_weight) {
  PolicyLossBackwardArgs<T> a{};
  a.batch = sessions_of(kOp, logps.size(0), lengths, offsets, num_positives);
  a.levels = logps.size(1);
  const LossGradient<T> upstream = loss_gradient<T>(kOp, "grad_loss", grad_loss, a.batch);
  a.grad_loss = upstream.data;
  a.stride = upstream.stride;
  a.gradient = data_of<T>(kOp, "gradient", gradient, logps.numel());
  a.scales = data_of<T>(kOp, "scales", scales, 2);
  a.counted = data_of<bool>(kOp, "counted", counted, a.batch.sessions);
  a.level_weights = data_of<T>(kOp, "level_weights", level_weights, a.levels);
  a.nll_weight = nll_weight;
  Tensor grad_logps = new_empty(logps, {logps.size(0), a.levels}, logps.scalar_type());
  a.grad_logps = grad_logps.mutable_data_ptr<T>();
  run(a, logps);
  return grad_logps;
}

Tensor policy_loss_backward(const Tensor& grad_loss, const Tensor& logps, const Tensor& gradient, const Tensor& scales,
                            const Tensor& counted, const Tensor& lengths, const Tensor& offsets,
                            const Tensor& num_positives, const OptionalTensor& level_weights, double nll_weight) {
  check_device("policy_loss_backward", {{"logps", logps},
                                        {"grad_loss", grad_loss},
                                        {"gradient", gradient},
                                        {"scales", scales},
                                        {"counted", counted},
                                        {"lengths", lengths},
                                        {"offsets", offsets},
                                        {"num_positives", num_positives},
                                        {"level_weights", level_weights}});
  const auto run = is_float32(kOp, "logps", logps) ? &backward<float> : &backward<double>;
  return run(grad_loss, logps, gradient, scales, counted, lengths, offsets, num_positives, level_weights, nll_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&policy_loss));
  m.impl("policy_loss_backward", TORCH_BOX(&policy_loss_backward));
}
#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) {
  m.impl("policy_loss", TORCH_BOX(&policy_loss));
  m.impl("policy_loss_backward", TORCH_BOX(&policy_loss_backward));
}
#endif

}  // namespace raddpo
