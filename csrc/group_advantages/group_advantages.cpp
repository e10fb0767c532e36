// group_advantages for torch: checks, allocation, threads and streams.
#include "group_advantages.h"

#include <algorithm>
#include <atomic>
#include <tuple>

#include "../common/buffer.h"
#include "../common/isa.h"
#include "../common/session_tensors.h"
#include "group_advantages_cpu.h"

namespace raddpo {
namespace {

constexpr const char* kOp = "group_advantages";

using Result = std::tuple<Tensor, Tensor, Tensor>;

// The operator's arguments in schema order.
struct Inputs {
  const Tensor &rewards, &tokens, &lengths, &offsets, &num_positives;
  const OptionalTensor &weights, &baselines, &target_tokens, &target_lengths, &target_offsets, &level_weights;
  double blend, eps;
  std::int64_t credit, scale, baseline;
  bool count_experts, contiguous;
};

template <typename T>
GroupAdvantagesArgs<T> prepare(const Inputs& in, Result& out) {
  check_device(kOp, {{"rewards", in.rewards},
                     {"tokens", in.tokens},
                     {"lengths", in.lengths},
                     {"offsets", in.offsets},
                     {"num_positives", in.num_positives},
                     {"weights", in.weights},
                     {"baselines", in.baselines},
                     {"target_tokens", in.target_tokens},
                     {"target_lengths", in.target_lengths},
                     {"target_offsets", in.target_offsets},
                     {"level_weights", in.level_weights}});
  const ScalarType type = in.rewards.scalar_type();
  STD_TORCH_CHECK(in.rewards.dim() == 1 && in.tokens.dim() == 2,
                  "group_advantages: rewards must have shape (candidates), tokens (candidates, levels)");
  STD_TORCH_CHECK(!in.target_tokens || (in.target_tokens->dim() == 2 && in.target_lengths && in.target_offsets),
                  "group_advantages: target_tokens must have shape (targets, levels), with target_lengths and "
                  "target_offsets");
  const std::int64_t candidates = in.rewards.numel(), sessions = in.num_positives.numel();
  GroupAdvantagesArgs<T> a{};
  a.levels = in.tokens.size(1);
  a.batch = sessions_of(kOp, candidates, in.lengths, in.offsets, in.num_positives);
  a.tokens = data_of<std::int64_t>(kOp, "tokens", in.tokens, candidates * a.levels);
  a.rewards = data_of<T>(kOp, "rewards", in.rewards, candidates);
  a.weights = data_of<T>(kOp, "weights", in.weights, candidates);
  a.baselines = data_of<T>(kOp, "baselines", in.baselines, sessions);
  if (in.target_tokens) {
    a.targets = in.target_tokens->size(0);
    a.target_levels = in.target_tokens->size(1);
    a.target_tokens = data_of<std::int64_t>(kOp, "target_tokens", *in.target_tokens, a.targets * a.target_levels);
    a.target_lengths = data_of<std::int64_t>(kOp, "target_lengths", *in.target_lengths, a.targets);
    a.target_offsets = data_of<std::int64_t>(kOp, "target_offsets", *in.target_offsets, sessions + 1);
  }
  a.level_weights = data_of<T>(kOp, "level_weights", in.level_weights, a.levels);
  a.blend = in.blend;
  a.eps = in.eps;
  a.credit = static_cast<Credit>(in.credit);
  a.scale = static_cast<Scale>(in.scale);
  a.baseline = static_cast<Baseline>(in.baseline);
  a.count_experts = in.count_experts;
  a.contiguous = in.contiguous;
  const bool by_row = a.credit == Credit::sequence, gated = a.credit == Credit::marginal;
  out = {by_row ? new_empty(in.rewards, {candidates}, type) : new_empty(in.rewards, {candidates, a.levels}, type),
         new_empty(in.rewards, {sessions}, ScalarType::Bool),
         new_empty(in.rewards, {gated ? candidates : 0, a.levels}, type)};
  auto& [values, active, gates] = out;
  a.values = values.template mutable_data_ptr<T>();
  a.active = active.template mutable_data_ptr<bool>();
  a.gates = gates.template mutable_data_ptr<T>();
  return a;
}

template <typename T>
void run_cpu(const GroupAdvantagesArgs<T>& a) {
  const std::int64_t sessions = a.batch.sessions, candidates = a.batch.candidates;
  const double batch_std = a.scale == Scale::batch ? RADDPO_CALL_ISA(batch_std, a) : 0;
  std::atomic<bool> valid{true};
  const std::int64_t grain = grain_of(a.batch, candidates * (a.levels + 1), 1 << 12);
  parallel_for(sessions, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t most = most_candidates(a.batch, begin, end) + 1;
    const Buffer<GroupRow> rows(2 * most);
    const Buffer<std::int64_t> children(most);
    const Buffer<std::int32_t> shared(most);
    const Buffer<double> scores(most * std::max<std::int64_t>(a.levels, 1));
    const Buffer<GroupPlace> places(2 * most);
    const GroupScratch m{rows.get(), rows.get() + most, places.get(), children.get(), shared.get(), scores.get()};
    if (!RADDPO_CALL_ISA(group_advantages, a, m, batch_std, begin, end)) valid = false;
  });
  STD_TORCH_CHECK(valid, "group_advantages: rewards must be finite or NaN, weights finite and at least 0");
}

template <typename T>
void run(const GroupAdvantagesArgs<T>& a, const Tensor& rewards) {
#ifdef RADDPO_WITH_CUDA
  if (rewards.is_cuda()) {
    const std::int32_t device = rewards.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    Tensor workspace = new_empty(rewards, {cuda::group_advantages_workspace(a)}, ScalarType::Byte);
    check_launch(cuda::group_advantages(a, workspace.mutable_data_ptr(), current_cuda_stream(device)),
                 "group_advantages");
    return;
  }
#endif
  run_cpu(a);
}

Result group_advantages(const Tensor& rewards, const Tensor& tokens, const Tensor& lengths, const Tensor& offsets,
                        const Tensor& num_positives, const OptionalTensor& weights, const OptionalTensor& baselines,
                        const OptionalTensor& target_tokens, const OptionalTensor& target_lengths,
                        const OptionalTensor& target_offsets, const OptionalTensor& level_weights, double blend,
                        double eps, std::int64_t credit, std::int64_t scale, std::int64_t baseline, bool count_experts,
                        bool contiguous) {
  const Inputs in{rewards,   tokens,        lengths,        offsets,        num_positives, weights,
                  baselines, target_tokens, target_lengths, target_offsets, level_weights, blend,
                  eps,       credit,        scale,          baseline,       count_experts, contiguous};
  Result out;
  if (is_float32(kOp, "rewards", rewards))
    run(prepare<float>(in, out), rewards);
  else
    run(prepare<double>(in, out), rewards);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) { m.impl("group_advantages", TORCH_BOX(&group_advantages)); }
#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) { m.impl("group_advantages", TORCH_BOX(&group_advantages)); }
#endif

}  // namespace raddpo
