// session_loss for torch: checks, allocation, threads and streams.
#include "session_loss.h"

#include <tuple>

#include "../common/buffer.h"
#include "../common/isa.h"
#include "../common/session_tensors.h"
#include "session_loss_cpu.h"
#include "session_loss_math.h"

namespace raddpo {
namespace {

constexpr const char* kOp = "session_loss";

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The operator's arguments in schema order.
struct Inputs {
  const Tensor &logps, &tokens, &lengths, &offsets, &num_positives, &pair_offsets;
  std::int64_t num_pairs;
  const OptionalTensor &ref_logps, &pair_weights, &detach, &level_weights, &divisors;
  double session_divisor, token_divisor, beta, gamma, sft_weight, label_smoothing;
  bool length_normalized;
  std::int64_t protect, aggregation, weighting, positives, reduction;
  bool need_gradient;
};

template <typename T>
SessionLossArgs<T> prepare(const Inputs& in, Result& out) {
  check_device(kOp, {{"logps", in.logps},
                     {"tokens", in.tokens},
                     {"lengths", in.lengths},
                     {"offsets", in.offsets},
                     {"num_positives", in.num_positives},
                     {"pair_offsets", in.pair_offsets},
                     {"ref_logps", in.ref_logps},
                     {"pair_weights", in.pair_weights},
                     {"detach", in.detach},
                     {"level_weights", in.level_weights},
                     {"divisors", in.divisors}});
  const ScalarType type = in.logps.scalar_type();
  SessionLossArgs<T> a{};
  STD_TORCH_CHECK(in.logps.dim() == 2 && in.tokens.dim() == 2 && in.num_pairs >= 0,
                  "session_loss: logps must have shape (candidates, columns), tokens (candidates, levels)");
  a.batch = sessions_of(kOp, in.logps.size(0), in.lengths, in.offsets, in.num_positives);
  const std::int64_t candidates = a.batch.candidates, sessions = a.batch.sessions;
  a.levels = in.tokens.size(1);
  a.columns = in.logps.size(1);
  a.pairs = in.num_pairs;
  a.tokens = data_of<std::int64_t>(kOp, "tokens", in.tokens, candidates * a.levels);
  a.pair_offsets = data_of<std::int64_t>(kOp, "pair_offsets", in.pair_offsets, sessions + 1);
  a.logps = data_of<T>(kOp, "logps", in.logps, candidates * a.columns);
  a.ref_logps = data_of<T>(kOp, "ref_logps", in.ref_logps, candidates * a.columns);
  a.pair_weights = data_of<T>(kOp, "pair_weights", in.pair_weights, a.pairs);
  a.detach = data_of<bool>(kOp, "detach", in.detach, candidates * a.columns);
  a.level_weights = data_of<T>(kOp, "level_weights", in.level_weights, a.columns);
  a.divisors = data_of<double>(kOp, "divisors", in.divisors, 2);
  a.divisor[0] = in.session_divisor;
  a.divisor[1] = in.token_divisor;
  a.beta = static_cast<T>(in.beta);
  a.gamma = static_cast<T>(in.gamma);
  a.sft_weight = static_cast<T>(in.sft_weight);
  a.label_smoothing = static_cast<T>(in.label_smoothing);
  a.length_normalized = in.length_normalized;
  a.protect = static_cast<Protect>(in.protect);
  a.aggregation = static_cast<Aggregation>(in.aggregation);
  a.weighting = static_cast<Weighting>(in.weighting);
  a.positives = static_cast<Positives>(in.positives);
  a.reduction = static_cast<Reduction>(in.reduction);
  const auto scalar = [&] { return new_empty(in.logps, {}, type); };
  const bool by_session = a.reduction == Reduction::none;
  const auto loss = [&] { return by_session ? new_empty(in.logps, {sessions}, type) : scalar(); };
  out = {loss(),
         loss(),
         loss(),
         new_empty(in.logps, {candidates}, type),
         new_empty(in.logps, {a.pairs}, type),
         scalar(),
         new_empty(in.logps, {a.pairs}, ScalarType::Bool),
         by_session ? new_empty(in.logps, {sessions, kTotals, 2}, ScalarType::Double)
                    : new_empty(in.logps, {kTotals, 2}, ScalarType::Double),
         new_empty(in.logps, {in.need_gradient ? candidates : 0, a.columns}, type),
         new_empty(in.logps, {2}, type)};
  auto& [total, preference, sft, rewards, margins, accuracy, kept, totals, gradient, scales] = out;
  a.loss = total.mutable_data_ptr<T>();
  a.preference = preference.mutable_data_ptr<T>();
  a.sft = sft.mutable_data_ptr<T>();
  a.rewards = rewards.mutable_data_ptr<T>();
  a.margins = margins.mutable_data_ptr<T>();
  a.accuracy = accuracy.mutable_data_ptr<T>();
  a.kept = kept.mutable_data_ptr<bool>();
  a.totals = totals.mutable_data_ptr<double>();
  a.gradient = in.need_gradient ? gradient.mutable_data_ptr<T>() : nullptr;
  a.scales = scales.mutable_data_ptr<T>();
  return a;
}

template <typename T>
void run_cpu(const SessionLossArgs<T>& a) {
  const std::int64_t sessions = a.batch.sessions, candidates = a.batch.candidates;
  const Buffer<SessionSums> sums(sessions);
  const std::int64_t grain = grain_of(a.batch, candidates * a.columns + a.pairs, 1 << 14);
  parallel_for(sessions, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t most = most_candidates(a.batch, begin, end) / 8 * 8 + 8;
    const Buffer<std::int32_t> integers(3 * most);
    const Buffer<T> values(3 * most);
    std::int32_t* const i = integers.get();
    T* const x = values.get();
    const SessionLossScratch<T> m{i, i + most, i + 2 * most, x, x + most, x + 2 * most};
    RADDPO_CALL_ISA(session_loss, a, m, begin, end, sums.get());
  });
  SessionSums total{};
  for (std::int64_t s = 0; s < sessions; ++s) add(total, sums[s]);
  STD_TORCH_CHECK(!total.bad_weights, "session_loss: pair_weights must be finite and at least 0");
  write_batch(a, total);
}

template <typename T>
void run_cpu(const SessionLossBackwardArgs<T>& a) {
  parallel_for(a.batch.sessions, grain_of(a.batch, a.batch.candidates * a.columns, 1 << 14),
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(session_loss_backward, a, begin, end); });
}

#ifdef RADDPO_WITH_CUDA
template <typename T>
void run_cuda(const SessionLossArgs<T>& a, const Tensor& logps) {
  Tensor workspace = new_empty(logps, {cuda::session_loss_workspace(a)}, ScalarType::Byte);
  check_launch(cuda::session_loss(a, workspace.mutable_data_ptr(), current_cuda_stream(logps.get_device_index())),
               "session_loss");
}

template <typename T>
void run_cuda(const SessionLossBackwardArgs<T>& a, const Tensor& logps) {
  check_launch(cuda::session_loss_backward(a, current_cuda_stream(logps.get_device_index())), "session_loss_backward");
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

Result session_loss(const Tensor& logps, const Tensor& tokens, const Tensor& lengths, const Tensor& offsets,
                    const Tensor& num_positives, const Tensor& pair_offsets, std::int64_t num_pairs,
                    const OptionalTensor& ref_logps, const OptionalTensor& pair_weights, const OptionalTensor& detach,
                    const OptionalTensor& level_weights, const OptionalTensor& divisors, double session_divisor,
                    double token_divisor, double beta, double gamma, double sft_weight, double label_smoothing,
                    bool length_normalized, std::int64_t protect, std::int64_t aggregation, std::int64_t weighting,
                    std::int64_t positives, std::int64_t reduction, bool need_gradient) {
  const Inputs in{logps,         tokens,     lengths,         offsets,           num_positives,
                  pair_offsets,  num_pairs,  ref_logps,       pair_weights,      detach,
                  level_weights, divisors,   session_divisor, token_divisor,     beta,
                  gamma,         sft_weight, label_smoothing, length_normalized, protect,
                  aggregation,   weighting,  positives,       reduction,         need_gradient};
  Result out;
  if (is_float32(kOp, "logps", logps))
    run(prepare<float>(in, out), logps);
  else
    run(prepare<double>(in, out), logps);
  return out;
}

template <typename T>
Tensor backward(const OptionalTensor (&upstream)[3], const Tensor& logps, const Tensor& gradient, const Tensor& scales,
                const Tensor& lengths, const Tensor& offsets, const Tensor& num_positives,
                const OptionalTensor& level_weights, double sft_weight) {
  check_device("session_loss_backward", {{"logps", logps},
                                         {"grad_loss", upstream[0]},
                                         {"grad_preference", upstream[1]},
                                         {"grad_sft", upstream[2]},
                                         {"gradient", gradient},
                                         {"scales", scales},
                                         {"lengths", lengths},
                                         {"offsets", offsets},
                                         {"num_positives", num_positives},
                                         {"level_weights", level_weights}});
  const ScalarType type = logps.scalar_type();
  SessionLossBackwardArgs<T> a{};
  a.batch = sessions_of(kOp, logps.size(0), lengths, offsets, num_positives);
  a.columns = logps.size(1);
  constexpr const char* names[] = {"grad_loss", "grad_preference", "grad_sft"};
  const T** const data[] = {&a.grad_loss, &a.grad_preference, &a.grad_sft};
  std::int64_t* const strides[] = {&a.stride_loss, &a.stride_preference, &a.stride_sft};
  for (int i = 0; i < 3; ++i) {
    if (!upstream[i]) continue;
    const LossGradient<T> given = loss_gradient<T>(kOp, names[i], *upstream[i], a.batch);
    *data[i] = given.data;
    *strides[i] = given.stride;
  }
  a.gradient = data_of<T>(kOp, "gradient", gradient, logps.numel());
  a.scales = data_of<T>(kOp, "scales", scales, 2);
  a.level_weights = data_of<T>(kOp, "level_weights", level_weights, a.columns);
  a.sft_weight = static_cast<T>(sft_weight);
  Tensor grad_logps = new_empty(logps, {logps.size(0), a.columns}, type);
  a.grad_logps = grad_logps.template mutable_data_ptr<T>();
  run(a, logps);
  return grad_logps;
}

Tensor session_loss_backward(const OptionalTensor& grad_loss, const OptionalTensor& grad_preference,
                             const OptionalTensor& grad_sft, const Tensor& logps, const Tensor& gradient,
                             const Tensor& scales, const Tensor& lengths, const Tensor& offsets,
                             const Tensor& num_positives, const OptionalTensor& level_weights, double sft_weight) {
  const OptionalTensor upstream[3] = {grad_loss, grad_preference, grad_sft};
  const auto run = is_float32(kOp, "logps", logps) ? &backward<float> : &backward<double>;
  return run(upstream, logps, gradient, scales, lengths, offsets, num_positives, level_weights, sft_weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) {
  m.impl("session_loss", TORCH_BOX(&session_loss));
  m.impl("session_loss_backward", TORCH_BOX(&session_loss_backward));
}
#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) {
  m.impl("session_loss", TORCH_BOX(&session_loss));
  m.impl("session_loss_backward", TORCH_BOX(&session_loss_backward));
}
#endif

}  // namespace raddpo
