// The kernels, compiled for the CPU from the very .cu files, behind C functions for ctypes.
#include "../../../csrc/beam_search/beam_search_cuda.cu"
#include "../../../csrc/child_logits/child_logits_cuda.cu"
#include "../../../csrc/group_advantages/group_advantages_cuda.cu"
#include "../../../csrc/legal_mass/legal_mass_cuda.cu"
#include "../../../csrc/policy_loss/policy_loss_cuda.cu"
#include "../../../csrc/row_lse/row_lse_cuda.cu"
#include "../../../csrc/sample_step/sample_step_cuda.cu"
#include "../../../csrc/session_loss/session_loss_cuda.cu"
#include "../../../csrc/token_logps/token_logps_cuda.cu"
#include "../../../csrc/trie/trie_cuda.cu"
#include "../../../csrc/trie_index/trie_view.h"
#include "faults.cuh"

using namespace raddpo;

namespace {

std::vector<std::unique_ptr<std::uint8_t[]>> workspaces;  // until the call's launches have run

// As full of garbage as a caching allocator's memory.
std::uint8_t* workspace_of(std::int64_t bytes) {
  if (!bytes) return nullptr;
  workspaces.emplace_back(new std::uint8_t[bytes]);
  std::memset(workspaces.back().get(), 0xa5, bytes);
  return workspaces.back().get();
}

// The arguments as shim.py lays them out, which must be as the compiler does.
template <typename T>
int run_session_loss(const void* memory, std::int64_t size) {
  const auto& a = *static_cast<const SessionLossArgs<T>*>(memory);
  if (size != sizeof(a)) return cudaErrorInvalidValue;
  std::uint8_t* workspace = workspace_of(cuda::session_loss_workspace(a));
  return cuda::session_loss(a, workspace, nullptr);
}

template <typename T>
int run_session_loss_backward(const void* memory, std::int64_t size) {
  const auto& a = *static_cast<const SessionLossBackwardArgs<T>*>(memory);
  return size == sizeof(a) ? cuda::session_loss_backward<T>(a, nullptr) : cudaErrorInvalidValue;
}

template <typename T>
int run_group_advantages(const void* memory, std::int64_t size) {
  const auto& a = *static_cast<const GroupAdvantagesArgs<T>*>(memory);
  if (size != sizeof(a)) return cudaErrorInvalidValue;
  std::uint8_t* workspace = workspace_of(cuda::group_advantages_workspace(a));
  return cuda::group_advantages(a, workspace, nullptr);
}

template <typename T>
int run_policy_loss(const void* memory, std::int64_t size) {
  const auto& a = *static_cast<const PolicyLossArgs<T>*>(memory);
  if (size != sizeof(a)) return cudaErrorInvalidValue;
  std::uint8_t* workspace = workspace_of(cuda::policy_loss_workspace(a));
  return cuda::policy_loss(a, workspace, nullptr);
}

template <typename T>
int run_policy_loss_backward(const void* memory, std::int64_t size) {
  const auto& a = *static_cast<const PolicyLossBackwardArgs<T>*>(memory);
  return size == sizeof(a) ? cuda::policy_loss_backward<T>(a, nullptr) : cudaErrorInvalidValue;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void set_order(unsigned threads, unsigned blocks) {
  cuda_on_cpu::block.order = threads;
  cuda_on_cpu::block.random.seed(threads);
  cuda_on_cpu::block_order = blocks;
}

// From now on this kernel runs as its PTX says; 0 if there is none.
EXPORT int run_translated(const char* name, const void* kernel) {
  const auto found = cuda_on_cpu::by_name.find(name);
  if (found == cuda_on_cpu::by_name.end()) return 0;
  cuda_on_cpu::by_kernel[kernel] = &found->second;
  return 1;
}

// Runs a translated kernel of two addresses, which no source has, on 64 threads.
EXPORT int run_alone(const char* name, std::uint64_t in, std::uint64_t out) {
  const std::uint64_t parameters[] = {reinterpret_cast<std::uint64_t>(&in), reinterpret_cast<std::uint64_t>(&out)};
  return cuda_on_cpu::run_translated({1, 64, 64, nullptr, nullptr, 0}, cuda_on_cpu::by_name.at(name), parameters);
}

void* raddpo::cuda::dynamic_shared() { return cuda_on_cpu::dynamics[cuda_on_cpu::entered].begin; }

// Ends a call: runs what it has launched.
EXPORT int finish() {
  const int error = cuda_on_cpu::run_once(cuda_on_cpu::last_launch);
  workspaces.clear();
  return error;
}

EXPORT const char* last_error() { return cuda_on_cpu::block.error.c_str(); }

// `sizes`: logit type, batch, width, vocab, stride_batch, stride_beam, beam_width, normalize, level.
EXPORT int beam_step(const std::uint8_t* trie, const std::int64_t* header, const std::uint8_t* live,
                     const std::int64_t* sizes, const void* logits, const float* scores, const std::int64_t* nodes,
                     const float* lse, double length_penalty, float* out_scores, std::int64_t* out_tokens,
                     std::int64_t* out_parents, std::int64_t* out_nodes) {
  BeamStepArgs a{};
  a.trie = view_of(trie, header, live);
  a.logits = logits;
  a.logit_type = static_cast<LogitType>(sizes[0]);
  a.batch = sizes[1];
  a.width = sizes[2];
  a.vocab = sizes[3];
  a.stride_batch = sizes[4];
  a.stride_beam = sizes[5];
  a.beam_width = sizes[6];
  a.normalize = static_cast<Normalize>(sizes[7]);
  a.level = sizes[8];
  a.scores = scores;
  a.nodes = nodes;
  a.lse = lse;
  for (int d = 0; d <= kMaxLevels; ++d)
    a.length_factor[d] = static_cast<float>(std::pow(std::max(d, 1), length_penalty));
  a.out_scores = out_scores;
  a.out_tokens = out_tokens;
  a.out_parents = out_parents;
  a.out_nodes = out_nodes;
  std::uint8_t* workspace = workspace_of(cuda::beam_step_workspace(a));
  return cuda::beam_step(a, workspace, nullptr);
}

// `sizes`: logit type, batch, width, vocab, stride_batch, stride_beam, beam_width, level.
EXPORT int sample_step(const std::uint8_t* trie, const std::int64_t* header, const std::uint8_t* live,
                       const std::int64_t* sizes, const void* logits, const float* scores, const float* perturbed,
                       const std::int64_t* nodes, const std::int64_t* keys, const std::int64_t* seed, double scale,
                       float* out_scores, std::int64_t* out_tokens, std::int64_t* out_parents, std::int64_t* out_nodes,
                       float* out_perturbed, float* out_logps) {
  SampleStepArgs a{};
  a.trie = view_of(trie, header, live);
  a.logits = logits;
  a.logit_type = static_cast<LogitType>(sizes[0]);
  a.batch = sizes[1];
  a.width = sizes[2];
  a.vocab = sizes[3];
  a.stride_batch = sizes[4];
  a.stride_beam = sizes[5];
  a.beam_width = sizes[6];
  a.level = sizes[7];
  a.normalize = Normalize::trie;
  a.scores = scores;
  a.perturbed = perturbed;
  a.nodes = nodes;
  a.keys = keys;
  a.seed = seed;
  a.scale = static_cast<float>(scale);
  a.out_scores = out_scores;
  a.out_tokens = out_tokens;
  a.out_parents = out_parents;
  a.out_nodes = out_nodes;
  a.out_perturbed = out_perturbed;
  a.out_logps = out_logps;
  std::uint8_t* workspace = workspace_of(cuda::sample_step_workspace(a));
  return cuda::sample_step(a, workspace, nullptr);
}

// `sizes`: type, rows, size, vocab, stride_hidden, stride_weight, level, columns; `numbers`: scale, softcap.
EXPORT int child_logits(const std::uint8_t* trie, const std::int64_t* header, const std::uint8_t* live,
                        const std::int64_t* sizes, const double* numbers, const void* hidden, const void* weight,
                        const void* bias, const float* scores, const std::int64_t* nodes, float* out) {
  ChildLogitsArgs a{};
  a.trie = view_of(trie, header, live);
  a.hidden = hidden;
  a.weight = weight;
  a.bias = bias;
  a.type = static_cast<LogitType>(sizes[0]);
  a.rows = sizes[1];
  a.size = sizes[2];
  a.vocab = sizes[3];
  a.stride_hidden = sizes[4];
  a.stride_weight = sizes[5];
  a.scores = scores;
  a.nodes = nodes;
  a.level = sizes[6];
  a.scale = static_cast<float>(numbers[0]);
  a.softcap = static_cast<float>(numbers[1]);
  a.columns = sizes[7];
  a.out = out;
  return cuda::child_logits(a, nullptr);
}

EXPORT int row_lse(const void* logits, int type, std::int64_t rows, std::int64_t cols, float* out) {
  return cuda::row_lse({logits, static_cast<LogitType>(type), rows, cols, out}, nullptr);
}

EXPORT int session_loss(bool is_double, const void* memory, std::int64_t size) {
  return (is_double ? run_session_loss<double> : run_session_loss<float>)(memory, size);
}

EXPORT int session_loss_backward(bool is_double, const void* memory, std::int64_t size) {
  return (is_double ? run_session_loss_backward<double> : run_session_loss_backward<float>)(memory, size);
}

// `sizes`: type, rows, cols. Forward without `grad`.
EXPORT int legal_mass(const std::int64_t* sizes, const void* logits, const std::int32_t* columns,
                      const std::int64_t* begin, const std::int64_t* count, void* mass, double* lse, const void* grad,
                      void* grad_logits) {
  const LegalMassArgs a{
      logits,     static_cast<LogitType>(sizes[0]), sizes[1], sizes[2], columns, begin, count, mass, lse, grad,
      grad_logits};
  return grad ? cuda::legal_mass_backward(a, nullptr) : cuda::legal_mass(a, nullptr);
}

EXPORT int group_advantages(bool is_double, const void* memory, std::int64_t size) {
  return (is_double ? run_group_advantages<double> : run_group_advantages<float>)(memory, size);
}

EXPORT int policy_loss(bool is_double, const void* memory, std::int64_t size) {
  return (is_double ? run_policy_loss<double> : run_policy_loss<float>)(memory, size);
}

EXPORT int policy_loss_backward(bool is_double, const void* memory, std::int64_t size) {
  return (is_double ? run_policy_loss_backward<double> : run_policy_loss_backward<float>)(memory, size);
}

EXPORT int trie_walk(const std::uint8_t* trie, const std::int64_t* header, const std::uint8_t* live,
                     const std::int64_t* tokens, std::int64_t rows, std::int64_t columns, std::int64_t* nodes) {
  return cuda::trie_walk({view_of(trie, header, live), tokens, rows, columns, nodes}, nullptr);
}

EXPORT int trie_paths(const std::uint8_t* trie, const std::int64_t* header, const std::uint8_t* live,
                      const std::int64_t* nodes, std::int64_t count, std::int64_t* codes, std::int64_t* depths) {
  return cuda::trie_paths({view_of(trie, header, live), nodes, count, codes, depths}, nullptr);
}

EXPORT int trie_select(const std::uint8_t* trie, const std::int64_t* header, const std::uint8_t* live,
                       const std::int64_t* places, std::int64_t count, bool items, std::int64_t* numbers) {
  const TrieView t = view_of(trie, header, live);
  return cuda::trie_select(
      {items ? t.live_items : t.live_nodes, header[items ? kNumItems : kNumNodes], places, count, numbers}, nullptr);
}

EXPORT int trie_top_items(const std::uint8_t* trie, const std::int64_t* header, const std::uint8_t* live,
                          const std::int64_t* nodes, std::int64_t rows, std::int64_t columns, std::int64_t top_k,
                          std::int64_t* items, std::int64_t* owners) {
  return cuda::trie_top_items({view_of(trie, header, live), nodes, rows, columns, top_k, trie + header[kItems],
                               header[kItemBytes] == 8, header[kNumItems], items, owners},
                              nullptr);
}

EXPORT int trie_ranges(const std::uint8_t* trie, const std::int64_t* header, const std::uint8_t* live,
                       const std::int64_t* nodes, std::int64_t count, bool items, std::int64_t* first,
                       std::int64_t* number) {
  return cuda::trie_ranges({view_of(trie, header, live), nodes, count, items, first, number}, nullptr);
}

// Runs one of the kernels of faults.cuh on values [64]; out [64].
EXPORT int fault(int kind, const int* values, int* out) {
  void (*const kernels[])(const int*, int*) = {cuda::reversed_kernel,          cuda::missing_barrier_kernel,
                                               cuda::divergent_barrier_kernel, cuda::early_exit_kernel,
                                               cuda::divergent_shuffle_kernel, cuda::early_kernel,
                                               cuda::too_early_kernel,         cuda::never_waiting_kernel};
  const bool early = kind > 4;
  if (early) cuda::launch(cuda::doubled_kernel, 1, 64, nullptr, values, out);
  return cuda::launch(kernels[kind], cuda::Grid{1, 64, 1, 0, early}, nullptr, values, out);
}

// 0: a GPU without clusters.
EXPORT void set_clusters(int has) { cuda_on_cpu::has_clusters = has; }

// The most shared memory that a block may ask for.
EXPORT void set_shared(int bytes) {
  cuda_on_cpu::most_shared_bytes = bytes;
  cuda_on_cpu::asked_for.clear();
}

// `sizes`: logit type, rows, inner, cols, strides of logits and of their gradient, first_column, vocab_size,
// ignore_index. Forward without `grad`.
EXPORT int token_logps(const std::int64_t* sizes, const void* logits, const std::int64_t* targets,
                       const std::int32_t* columns, const std::int64_t* begin, const std::int64_t* count, double scale,
                       double softcap, void* logps, double* lse, const void* grad, void* grad_logits) {
  TokenLogpsArgs a{};
  a.type = static_cast<LogitType>(sizes[0]);
  a.rows = sizes[1];
  a.inner = sizes[2];
  a.cols = sizes[3];
  a.strides = {sizes[4], sizes[5]};
  a.grad_strides = {sizes[6], sizes[7]};
  a.first_column = sizes[8];
  a.vocab_size = sizes[9];
  a.ignore_index = sizes[10];
  a.logits = logits;
  a.targets = targets;
  a.columns = columns;
  a.begin = begin;
  a.count = count;
  a.scale = scale;
  a.softcap = softcap;
  a.logps = logps;
  a.lse = lse;
  a.grad = grad;
  a.grad_logits = grad_logits;
  return grad ? cuda::token_logps_backward(a, nullptr) : cuda::token_logps(a, nullptr);
}
