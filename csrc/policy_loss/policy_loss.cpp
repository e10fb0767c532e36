// policy_loss for torch: checks, allocation, threads and streams.
#include "policy_loss.h"

#include <tuple>

#include "../common/buffer.h"
#include "../common/isa.h"
#include "../common/tensor.h"
#include "policy_loss_cpu.h"
#include "policy_loss_math.h"

namespace raddpo {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The operator's arguments in schema order.
struct Inputs {
  const Tensor &logps, &tokens, &lengths, &offsets, &num_positives, &advantages;
  const OptionalTensor &old_logps, &ref_logps, &weights, &gates, &level_weights, &divisors;
  double row_divisor, token_divisor, low, high, dual_clip, delta, kl_weight, nll_weight, max_length;
  std::int64_t objective, ratio, divergence, aggregate, reduction;
  bool use_experts, protect, count_all, need_gradient;
};

template <typename T>
const T* data_of(const Tensor& t, const char* name, ScalarType type, std::int64_t size) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == size, "policy_loss: ", name,
                  " must be contiguous, of the documented type and of ", size, " elements");
  return t.const_data_ptr<T>();
}

template <typename T>
const T* data_of(const OptionalTensor& t, const char* name, ScalarType type, std::int64_t size) {
  return t ? data_of<T>(*t, name, type, size) : nullptr;
}

Sessions sessions_of(const Tensor& logps, const Tensor& lengths, const Tensor& offsets, const Tensor& num_positives) {
  STD_TORCH_CHECK(logps.dim() == 2, "policy_loss: logps must have shape (candidates, levels)");
  constexpr ScalarType kLong = ScalarType::Long;
  const std::int64_t candidates = logps.size(0), sessions = num_positives.numel();
  return {data_of<std::int64_t>(lengths, "lengths", kLong, candidates),
          data_of<std::int64_t>(offsets, "offsets", kLong, sessions + 1),
          data_of<std::int64_t>(num_positives, "num_positives", kLong, sessions), sessions, candidates};
}

template <typename T>
PolicyLossArgs<T> prepare(const Inputs& in, Result& out) {
  check_device("policy_loss", {{"logps", in.logps},
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
  a.batch = sessions_of(in.logps, in.lengths, in.offsets, in.num_positives);
  const std::int64_t candidates = a.batch.candidates, sessions = a.batch.sessions;
  a.levels = in.logps.size(1);
  const std::int64_t size = candidates * a.levels;
  a.by_token = in.advantages.dim() == 2;
  a.tokens = data_of<std::int64_t>(in.tokens, "tokens", ScalarType::Long, size);
  a.logps = data_of<T>(in.logps, "logps", type, size);
  a.advantages = data_of<T>(in.advantages, "advantages", type, a.by_token ? size : candidates);
  a.old_logps = data_of<T>(in.old_logps, "old_logps", type, size);
  a.ref_logps = data_of<T>(in.ref_logps, "ref_logps", type, size);
  a.weights = data_of<T>(in.weights, "weights", type, candidates);
  a.gates = data_of<T>(in.gates, "gates", type, size);
  a.level_weights = data_of<T>(in.level_weights, "level_weights", type, a.levels);
  a.divisors = data_of<double>(in.divisors, "divisors", ScalarType::Double, 2);
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
         new_empty(in.logps, {sessions}, ScalarType::Bool),
         new_empty(in.logps, {in.need_gradient ? candidates : 0, a.levels}, type),
         new_empty(in.logps, {2}, type)};
  auto& [total, policy, kl, nll, ratios, clipped, approx_kl, counted, gradient, scales] = out;
  a.loss = total.template mutable_data_ptr<T>();
  a.policy = policy.template mutable_data_ptr<T>();
  a.kl = kl.template mutable_data_ptr<T>();
  a.nll = nll.template mutable_data_ptr<T>();
  a.ratios = ratios.template mutable_data_ptr<T>();
  a.clipped = clipped.template mutable_data_ptr<T>();
  a.approx_kl = approx_kl.template mutable_data_ptr<T>();
  a.counted = counted.template mutable_data_ptr<bool>();
  a.gradient = in.need_gradient ? gradient.template mutable_data_ptr<T>() : nullptr;
  a.scales = scales.template mutable_data_ptr<T>();
  return a;
}

// Groups per piece of work, so that a piece takes longer than waking a thread.
std::int64_t grain_of(const Sessions& b, std::int64_t levels, std::int64_t tokens) {
  return 1 + tokens * b.sessions / (b.candidates * levels + 1);
}

template <typename T>
void run_cpu(const PolicyLossArgs<T>& a) {
  const std::int64_t sessions = a.batch.sessions;
  const Buffer<PolicySums> sums(sessions);
  parallel_for(sessions, grain_of(a.batch, a.levels, 1 << 12),
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(policy_loss, a, begin, end, sums.get()); });
  PolicySums total{};
  for (std::int64_t s = 0; s < sessions; ++s) add(total, sums[s]);
  STD_TORCH_CHECK(total.of[kInvalid] == 0,
                  "policy_loss: advantages times gates must be finite, weights finite and at least 0");
  write_batch(a, total);
}

template <typename T>
void run_cpu(const PolicyLossBackwardArgs<T>& a) {
  parallel_for(a.batch.sessions, grain_of(a.batch, a.levels, 1 << 14),
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

void check_type(const Tensor& logps) {
  STD_TORCH_CHECK(logps.scalar_type() == ScalarType::Float || logps.scalar_type() == ScalarType::Double,
                  "policy_loss: logps must be float32 or float64");
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
  check_type(logps);
  Result out;
  if (logps.scalar_type() == ScalarType::Float)
    run(prepare<float>(in, out), logps);
  else
    run(prepare<double>(in, out), logps);
  return out;
}

template <typename T>
Tensor backward(const Tensor& grad_loss, const Tensor& gradient, const Tensor& scales, const Tensor& counted,
                const Tensor& lengths, const Tensor& offsets, const Tensor& num_positives,
                const OptionalTensor& level_weights, double nll_weight) {
  const ScalarType type = gradient.scalar_type();
  PolicyLossBackwardArgs<T> a{};
  a.batch = sessions_of(gradient, lengths, offsets, num_positives);
  a.levels = gradient.size(1);
  STD_TORCH_CHECK(
      grad_loss.scalar_type() == type && (!grad_loss.dim() || grad_loss.numel() == a.batch.sessions),
      "policy_loss_backward: grad_loss must be of the type of logps and have one element, or one per group");
  a.grad_loss = grad_loss.const_data_ptr<T>();
  a.stride = grad_loss.dim() ? grad_loss.stride(0) : 0;
  a.gradient = data_of<T>(gradient, "gradient", type, gradient.numel());
  a.scales = data_of<T>(scales, "scales", type, 2);
  a.counted = data_of<bool>(counted, "counted", ScalarType::Bool, a.batch.sessions);
  a.level_weights = data_of<T>(level_weights, "level_weights", type, a.levels);
  a.nll_weight = nll_weight;
  Tensor grad_logps = new_empty(gradient, {gradient.size(0), a.levels}, type);
  a.grad_logps = grad_logps.mutable_data_ptr<T>();
  run(a, gradient);
  return grad_logps;
}

Tensor policy_loss_backward(const Tensor& grad_loss, const Tensor& gradient, const Tensor& scales,
                            const Tensor& counted, const Tensor& lengths, const Tensor& offsets,
                            const Tensor& num_positives, const OptionalTensor& level_weights, double nll_weight) {
  check_device("policy_loss_backward", {{"grad_loss", grad_loss},
                                        {"gradient", gradient},
                                        {"scales", scales},
                                        {"counted", counted},
                                        {"lengths", lengths},
                                        {"offsets", offsets},
                                        {"num_positives", num_positives},
                                        {"level_weights", level_weights}});
  check_type(gradient);
  const auto run = gradient.scalar_type() == ScalarType::Float ? &backward<float> : &backward<double>;
  return run(grad_loss, gradient, scales, counted, lengths, offsets, num_positives, level_weights, nll_weight);
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
