#pragma once
// Kernel interface of session_loss, the preference and SFT losses over ragged sessions: raw pointers, no torch and no
// CUDA headers. T is float or double, the type of the log-probs and of the arithmetic.
#include <cstdint>

#include "../common/sessions.h"

struct CUstream_st;

namespace raddpo {

enum class Protect : int { winner, positives, none };
enum class Aggregation : int { negatives, margins };
enum class Weighting : int { loss, reward };
enum class Positives : int { winner, each, pooled };

template <typename T>
struct SessionLossArgs {
  Sessions batch;
  const std::int64_t* tokens;        // [candidates, levels]
  const std::int64_t* pair_offsets;  // [sessions + 1]
  std::int64_t levels, pairs;
  std::int64_t columns;    // of the log-probs: levels, or 1 where each candidate has one score
  const T* logps;          // [candidates, columns], read within the lengths only
  const T* ref_logps;      // the same, or null
  const T* pair_weights;   // [pairs], or null: 1
  const bool* detach;      // [candidates, columns], or null
  const T* level_weights;  // [columns], or null: 1
  const double* divisors;  // [2] of preference and sft, or null: use `divisor`
  double divisor[2];       // 0: use the counts
  T beta, gamma, sft_weight, label_smoothing;
  bool length_normalized;
  Protect protect;
  Aggregation aggregation;
  Weighting weighting;
  Positives positives;
  Reduction reduction;
  T *loss, *preference, *sft;  // [1], or [sessions] under Reduction::none
  T* rewards;                  // [candidates]
  T* margins;                  // [pairs]
  T* accuracy;                 // [1]
  bool* kept;                  // [pairs]: whether the pair is in the preference loss
  double* totals;              // [kTotals, 2], or [sessions, kTotals, 2] under Reduction::none
  T* gradient;                 // [candidates, columns] of each session's preference term, or null
  T* scales;                   // [2] factors on the sums of preference and sft
};

// The rows of the totals: a sum and the count to divide it by. raddpo_ext/losses/session_loss.py names them.
enum Total : int {
  kPreference,  // terms; sessions that keep a pair
  kSft,         // minus log-probs; tokens of positives
  kChosen,      // rewards of positives that are not empty
  kRejected,    // rewards of negatives that are not empty
  kMargins,     // of the loss's pairs
  kWins,        // margins above 0; the loss's pairs
  kWeights,     // of the loss's pairs
  kDetached,    // detached tokens of the negatives in the loss's pairs; all tokens of these negatives
  kDropped,     // pairs with an empty member or of equal SIDs; all pairs
  kTotals
};

struct Sum {
  double value, count;
};

// What a session adds to the totals.
struct SessionSums {
  Sum of[kTotals];
  std::int64_t bad_weights;  // 1 if the session has any; found on the CPU only
};

// grad_logps = upstream gradient of preference * gradient + that of sft * (-level_weights).
template <typename T>
struct SessionLossBackwardArgs {
  Sessions batch;
  std::int64_t columns;
  const T *grad_loss, *grad_preference, *grad_sft;  // one element per session at these strides, or null: 0
  std::int64_t stride_loss, stride_preference, stride_sft;
  const T* gradient;       // [candidates, columns]
  const T* scales;         // [2]
  const T* level_weights;  // [columns], or null: 1
  T sft_weight;
  T* grad_logps;  // [candidates, columns]
};

namespace cuda {
// Bytes of device workspace for session_loss.
template <typename T>
std::int64_t session_loss_workspace(const SessionLossArgs<T>& a);
template <typename T>
int session_loss(const SessionLossArgs<T>& a, void* workspace, CUstream_st* stream);  // these return cudaError_t
template <typename T>
int session_loss_backward(const SessionLossBackwardArgs<T>& a, CUstream_st* stream);
}  // namespace cuda

}  // namespace raddpo
