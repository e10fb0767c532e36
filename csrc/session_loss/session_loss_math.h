#pragma once
// The formulas of session_loss that the CPU and the CUDA kernels share.
#include <cmath>

#include "../common/math.h"
#include "session_loss.h"

namespace raddpo {

template <typename T>
RADDPO_HD Session session_of(const SessionLossArgs<T>& a, std::int64_t s) {
  Session v = session_of(a.batch, s);
  v.first_pair = a.pair_offsets[s];
  const bool sound = v.first_pair >= 0 && v.positives * v.negatives <= a.pairs - v.first_pair;
  return sound ? v : Session{0, 0, 0, 0};
}

// The factor of each log-prob in a candidate's reward.
template <typename T>
RADDPO_HD T scale_of(const SessionLossArgs<T>& a, std::int64_t length) {
  return a.length_normalized ? a.beta / static_cast<T>(length > 1 ? length : 1) : a.beta;
}

template <typename T>
RADDPO_HD T reward_of(const SessionLossArgs<T>& a, std::int64_t row) {
  const std::int64_t length = clamp_length(a.batch.lengths[row], a.columns);
  const T* logps = a.logps + row * a.columns;
  T sum = 0;
  if (a.ref_logps) {
    const T* ref = a.ref_logps + row * a.columns;
    for (std::int64_t i = 0; i < length; ++i) sum += logps[i] - ref[i];
  } else {
    for (std::int64_t i = 0; i < length; ++i) sum += logps[i];
  }
  return length ? scale_of(a, length) * sum : T(0);
}

template <typename T>
RADDPO_HD Sid sid_of(const SessionLossArgs<T>& a, std::int64_t row) {
  return {a.tokens + row * a.levels, static_cast<std::int32_t>(clamp_length(a.batch.lengths[row], a.levels))};
}

// Whether a pair of SIDs with `prefix` tokens in common is dropped regardless of its weight: one of them is empty, or
// they are equal.
RADDPO_HD bool no_pair(std::int32_t prefix, std::int32_t length, std::int32_t other) {
  return length == 0 || other == 0 || (prefix == length && prefix == other);
}

// The number of tokens of a row that `detach` marks.
template <typename T>
RADDPO_HD std::int32_t detached_of(const SessionLossArgs<T>& a, std::int64_t row) {
  const std::int64_t length = clamp_length(a.batch.lengths[row], a.columns);
  std::int32_t count = 0;
  for (std::int64_t i = 0; i < length; ++i) count += a.detach[row * a.columns + i];
  return count;
}

// positive - negative; 0 for equal infinities too.
template <typename T>
RADDPO_HD T margin_of(T positive, T negative) {
  return positive == negative ? T(0) : positive - negative;
}

// e^x for x <= 0. Float results too small to change a sum are flushed to 0: denormal numbers are slow.
RADDPO_HD float softmax_exp(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  return x > -87.f ? fast_exp(x) : x != x ? x : 0.f;
#endif
}
RADDPO_HD double softmax_exp(double x) { return std::exp(x); }

// e^(x - most): the softmax weight of an exponent x before division by the sum. 1 where both are infinite and equal.
template <typename T>
RADDPO_HD T softmax_weight(T x, T most) {
  return x == most ? T(1) : softmax_exp(x - most);
}

// Natural logarithm of x > 0, to 2e-7 absolute.
RADDPO_HD float fast_log(float x) {
#if defined(__CUDA_ARCH__)
  return logf(x);
#else
  const bool subnormal = x < 0x1p-126f;
  const float scaled = subnormal ? x * 0x1p64f : x;
  std::uint32_t bits;
  std::memcpy(&bits, &scaled, 4);
  const std::uint32_t from = bits - 0x3f3504f3u;  // moves the mantissa to [sqrt(1/2), sqrt(2))
  const float exponent = static_cast<float>(static_cast<std::int32_t>(from) >> 23) - (subnormal ? 64.f : 0.f);
  bits = (from & 0x7fffffu) + 0x3f3504f3u;
  float mantissa;
  std::memcpy(&mantissa, &bits, 4);
  const float s = (mantissa - 1.f) / (mantissa + 1.f), square = s * s;  // log m = 2 artanh s
  float p = 0.22222222f;
  p = p * square + 0.28571429f;
  p = p * square + 0.4f;
  p = p * square + 0.66666667f;
  return exponent * 0.69314718f + (s * square * p + 2.f * s);
#endif
}
RADDPO_HD double fast_log(double x) { return std::log(x); }

// The log-sum-exp runs over the negatives' weighted rewards, with their sign reversed under `margins`.
template <typename T>
RADDPO_HD T sign_of(const SessionLossArgs<T>& a) {
  return a.aggregation == Aggregation::margins ? T(-1) : T(1);
}

// The loss argument A of rad_dpo_loss, from the log-sum-exp of the negatives' exponents and the winner's reward.
template <typename T>
RADDPO_HD T loss_argument(const SessionLossArgs<T>& a, T lse, T winner) {
  const T negatives = sign_of(a) * lse + a.gamma;
  return negatives == -INFINITY ? negatives : negatives - winner;
}

template <typename T>
struct Term {
  T value, derivative;  // derivative: d value / d argument
};

template <typename T>
RADDPO_HD Term<T> term_of(T argument, T smoothing) {
  const T e = std::exp(-std::fabs(argument)), rest = std::log1p(e);
  const T up = (argument > 0 ? argument : T(0)) + rest;     // softplus(argument)
  const T down = (argument < 0 ? -argument : T(0)) + rest;  // softplus(-argument)
  const T sigmoid = (argument > 0 ? T(1) : e) / (1 + e);
  // Negatives of probability 0 have no gradient: label smoothing does not apply to them.
  const T derivative = argument == -INFINITY ? T(0) : sigmoid - smoothing;
  return {smoothing > 0 ? (1 - smoothing) * up + smoothing * down : up, derivative};
}

// The derivative of the loss argument in the reward of a negative of this softmax weight.
template <typename T>
RADDPO_HD T argument_derivative(const SessionLossArgs<T>& a, T weight, T pair_weight) {
  return a.weighting == Weighting::reward ? weight * pair_weight : weight;
}

// Adds `factor` times the reward's gradient to the tokens of a row from `begin` on.
template <typename T>
RADDPO_HD void add_gradient(const SessionLossArgs<T>& a, std::int64_t row, std::int64_t begin, T factor) {
  const std::int64_t length = clamp_length(a.batch.lengths[row], a.columns);
  T* gradient = a.gradient + row * a.columns;
  factor *= scale_of(a, length);
  for (std::int64_t i = begin; i < length; ++i) gradient[i] += factor;
}

RADDPO_HD void add(Sum& sum, double value, double count) {
  sum.value += value;
  sum.count += count;
}

RADDPO_HD void add(SessionSums& sums, const SessionSums& more) {
  for (int i = 0; i < kTotals; ++i) add(sums.of[i], more.of[i].value, more.of[i].count);
  sums.bad_weights += more.bad_weights;
}

// Adds the SFT loss of a positive.
template <typename T>
RADDPO_HD void add_sft(const SessionLossArgs<T>& a, std::int64_t row, SessionSums& sums) {
  const std::int64_t length = clamp_length(a.batch.lengths[row], a.columns);
  add(sums.of[kSft], 0, static_cast<double>(length));
  for (std::int64_t i = 0; i < length; ++i) {
    const T weight = a.level_weights ? a.level_weights[i] : T(1);
    if (weight > 0) sums.of[kSft].value -= weight * a.logps[row * a.columns + i];  // 0 * -inf is NaN
  }
}

// The factor on the saved gradient of session s, and the factor on the SFT gradient of its positives.
template <typename T>
RADDPO_HD T preference_factor(const SessionLossBackwardArgs<T>& a, std::int64_t s) {
  const T loss = a.grad_loss ? a.grad_loss[s * a.stride_loss] : T(0);
  return a.scales[0] * (a.grad_preference ? loss + a.grad_preference[s * a.stride_preference] : loss);
}
template <typename T>
RADDPO_HD T sft_factor(const SessionLossBackwardArgs<T>& a, std::int64_t s) {
  const T loss = a.grad_loss ? a.grad_loss[s * a.stride_loss] * a.sft_weight : T(0);
  return a.scales[1] * (a.grad_sft ? loss + a.grad_sft[s * a.stride_sft] : loss);
}

// Writes entry `at` of the losses and of the totals.
template <typename T>
RADDPO_HD void write_entry(const SessionLossArgs<T>& a, std::int64_t at, const SessionSums& sums,
                           double preference_scale, double sft_scale) {
  const T preference = static_cast<T>(sums.of[kPreference].value * preference_scale);
  const T sft = static_cast<T>(sums.of[kSft].value * sft_scale);
  a.preference[at] = preference;
  a.sft[at] = sft;
  a.loss[at] = a.sft_weight > 0 ? preference + a.sft_weight * sft : preference;  // 0 * inf is NaN
  double* totals = a.totals + 2 * kTotals * at;
  for (int i = 0; i < kTotals; ++i) {
    totals[2 * i] = sums.of[i].value;
    totals[2 * i + 1] = sums.of[i].count;
  }
}

template <typename T>
RADDPO_HD void write_session(const SessionLossArgs<T>& a, std::int64_t s, const SessionSums& sums) {
  if (a.reduction == Reduction::none) write_entry(a, s, sums, 1, 1);
}

template <typename T>
RADDPO_HD void write_batch(const SessionLossArgs<T>& a, const SessionSums& sums) {
  double scales[2];
  for (int i = 0; i < 2; ++i) {
    const double given = a.divisors ? a.divisors[i] : a.divisor[i], count = sums.of[i ? kSft : kPreference].count;
    const double divisor = given > 0 ? given : count > 1 ? count : 1;
    scales[i] = a.reduction == Reduction::mean ? 1 / divisor : 1;
    a.scales[i] = static_cast<T>(scales[i]);
  }
  if (a.reduction != Reduction::none) write_entry(a, 0, sums, scales[0], scales[1]);
  const Sum wins = sums.of[kWins];
  a.accuracy[0] = wins.count > 0 ? static_cast<T>(wins.value) / static_cast<T>(wins.count) : T(0);
}

}  // namespace raddpo
