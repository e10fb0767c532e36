// Every operator of the package, in one place. `trie` is a TrieIndex's block of bytes on the op's device, `header` its
// header words on the CPU (csrc/trie_index/trie.h), `live` which of its nodes and items are left, beside it
// (trie_view.h).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(raddpo, m) {
  m.def(
      "beam_step(Tensor logits, Tensor scores, Tensor nodes, Tensor trie, Tensor header, Tensor? live, Tensor? lse, "
      "int level, int "
      "beam_width, int normalize, float length_penalty) -> (Tensor scores, Tensor tokens, Tensor parents, Tensor "
      "nodes)");
  // keys [B], seed one number; csrc/sample_step/sample_step.h.
  m.def(
      "sample_step(Tensor logits, Tensor scores, Tensor perturbed, Tensor nodes, Tensor keys, Tensor seed, Tensor "
      "trie, Tensor header, Tensor? live, int level, int beam_width, float scale, bool replacement) -> (Tensor scores, "
      "Tensor tokens, Tensor parents, Tensor nodes, Tensor perturbed, Tensor logps)");
  // Logits [N, columns] of the children of beams at one level; csrc/child_logits/child_logits.h.
  m.def(
      "child_logits(Tensor hidden, Tensor weight, Tensor? bias, Tensor scores, Tensor nodes, Tensor trie, Tensor "
      "header, Tensor? live, float scale, float softcap, int level, int columns) -> Tensor");
  // For a block from elsewhere, in C++; on the CPU only. Python's TrieIndex.load calls the same check.
  m.def("trie_check(Tensor trie, int threads) -> Tensor header");
  m.def("trie_walk(Tensor tokens, Tensor trie, Tensor header, Tensor? live) -> Tensor nodes");
  m.def(
      "trie_paths(Tensor nodes, Tensor trie, Tensor header, Tensor? live, int sid_levels) -> (Tensor codes, Tensor "
      "depths)");
  m.def("trie_items(Tensor nodes, Tensor trie, Tensor header, Tensor? live) -> (Tensor first, Tensor count)");
  m.def("trie_children(Tensor nodes, Tensor trie, Tensor header, Tensor? live) -> (Tensor first, Tensor count)");
  m.def(
      "trie_top_items(Tensor nodes, Tensor trie, Tensor header, Tensor? live, int top_k) -> (Tensor items, Tensor "
      "owners)");
  m.def("trie_select(Tensor places, Tensor trie, Tensor header, Tensor? live, bool items) -> Tensor numbers");
  // Rows of prompt and candidates; csrc/pack_sessions/pack_sessions.h. On the CPU only.
  m.def(
      "pack_sessions(Tensor prompts, Tensor prompt_begins, Tensor prompt_lengths, Tensor tokens, Tensor lengths, "
      "Tensor offsets, bool trie, bool last_token, bool pad_left, int pad_token_id, int multiple_of) -> (Tensor "
      "input_ids, Tensor position_ids, Tensor ends, Tensor predictors, Tensor last_tokens, Tensor prompt_starts)");
  // Rows that take the nearest code with room; csrc/assign_balanced/assign_balanced.h. On the CPU only.
  m.def("assign_balanced(Tensor distances, Tensor(a!) room, Tensor? groups) -> Tensor assigned");
  m.def("row_lse(Tensor logits, Tensor(a!) out) -> ()");
  // Logits [outer, inner, cols]; targets, lse, grad, begin and count [outer, inner]; csrc/token_logps/token_logps.h.
  m.def(
      "token_logps(Tensor logits, Tensor targets, Tensor? columns, Tensor? begin, Tensor? count, float scale, "
      "float softcap, int ignore_index, int first_column, SymInt vocab_size) -> (Tensor logps, Tensor lse)");
  m.def(
      "token_logps_backward(Tensor grad, Tensor logits, Tensor targets, Tensor lse, Tensor? columns, Tensor? begin, "
      "Tensor? count, float scale, float softcap, int ignore_index, int first_column, SymInt vocab_size) -> Tensor");
  m.def(
      "token_logps_backward_(Tensor grad, Tensor(a!) logits, Tensor targets, Tensor lse, Tensor? columns, Tensor? "
      "begin, Tensor? count, Tensor? live, float scale, float softcap, int ignore_index, int first_column, SymInt "
      "vocab_size) -> ()");
  // Words as in csrc/session_loss/session_loss.h; a divisor of 0 stands for the count.
  m.def(
      "session_loss(Tensor logps, Tensor tokens, Tensor lengths, Tensor offsets, Tensor num_positives, Tensor "
      "pair_offsets, SymInt num_pairs, Tensor? ref_logps, Tensor? pair_weights, Tensor? detach, Tensor? level_weights, "
      "Tensor? divisors, float session_divisor, float token_divisor, float beta, float gamma, float sft_weight, float "
      "label_smoothing, bool length_normalized, int protect, int aggregation, int weighting, int positives, int "
      "reduction, bool need_gradient) -> (Tensor loss, Tensor preference, Tensor sft, Tensor rewards, Tensor margins, "
      "Tensor accuracy, Tensor kept, Tensor totals, Tensor gradient, Tensor scales)");
  m.def(
      "session_loss_backward(Tensor? grad_loss, Tensor? grad_preference, Tensor? grad_sft, Tensor logps, Tensor "
      "gradient, Tensor scales, Tensor lengths, Tensor offsets, Tensor num_positives, Tensor? level_weights, float "
      "sft_weight) -> Tensor");
  // Words as in csrc/group_advantages/group_advantages.h. No gradient.
  m.def(
      "group_advantages(Tensor rewards, Tensor tokens, Tensor lengths, Tensor offsets, Tensor num_positives, Tensor? "
      "weights, Tensor? baselines, Tensor? target_tokens, Tensor? target_lengths, Tensor? target_offsets, Tensor? "
      "level_weights, float blend, float eps, int credit, int scale, int baseline, bool count_experts, bool "
      "contiguous) -> (Tensor values, Tensor active, Tensor gates)");
  // Logits [rows, cols], lists of columns as in csrc/legal_mass/legal_mass.h.
  m.def("legal_mass(Tensor logits, Tensor columns, Tensor begin, Tensor count) -> (Tensor mass, Tensor lse)");
  m.def(
      "legal_mass_backward(Tensor grad, Tensor logits, Tensor lse, Tensor columns, Tensor begin, Tensor count) -> "
      "Tensor");
  // Words as in csrc/policy_loss/policy_loss.h; a divisor of 0 stands for the count.
  m.def(
      "policy_loss(Tensor logps, Tensor tokens, Tensor lengths, Tensor offsets, Tensor num_positives, Tensor "
      "advantages, Tensor? old_logps, Tensor? ref_logps, Tensor? weights, Tensor? gates, Tensor? level_weights, "
      "Tensor? divisors, float row_divisor, float token_divisor, float low, float high, float dual_clip, float delta, "
      "float kl_weight, float nll_weight, float max_length, int objective, int ratio, int divergence, int aggregate, "
      "int reduction, bool use_experts, bool protect, bool count_all, bool need_gradient) -> (Tensor loss, Tensor "
      "policy, Tensor kl, Tensor nll, Tensor ratios, Tensor clipped, Tensor approx_kl, Tensor counts, Tensor "
      "counted, Tensor gradient, Tensor scales)");
  m.def(
      "policy_loss_backward(Tensor grad_loss, Tensor logps, Tensor gradient, Tensor scales, Tensor counted, Tensor "
      "lengths, Tensor offsets, Tensor num_positives, Tensor? level_weights, float nll_weight) -> Tensor");
}
