"""The faults: each replaces one text, which its file holds exactly once, and runs the tests of its op only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

#: Test files of each op. CUDA kernels are run on the CPU, by python_tests/support/cuda_on_cpu.
TESTS = {
    "beam_search": ("test_beam_search", "test_beam_step"),
    "beam_search, CUDA": ("gpu/test_cuda_on_cpu",),
    "linear_beam_step": ("test_linear_beam_step",),
    "trie, build": ("test_trie", "test_trie_file"),
    "trie, live": ("test_trie_live",),
    "trie, merge": ("test_trie_live",),
    "token_logps": ("test_token_logps", "test_token_logps_autograd"),
    "token_logps, CUDA": ("test_token_logps_cuda",),
    "linear_token_logps": ("test_linear_token_logps", "test_linear_autograd", "test_linear_shared"),
    "row_lse": ("test_row_lse",),
    "session_loss": ("test_session_loss", "test_session_loss_exact", "test_session_loss_formulas"),
    "session_loss, CUDA": ("test_session_loss_cuda",),
    "similarity_weighting": ("test_similarity_weighting",),
    "sample_search": ("test_sample_search", "test_policy_gradient_sampled"),
    "group_advantages": ("test_group_advantages", "test_group_advantages_exact", "test_policy_gradient"),
    "policy_loss": ("test_policy_loss", "test_policy_loss_exact", "test_policy_loss_formulas", "test_policy_gradient"),
    "assign_balanced": ("test_assign_balanced", "test_resolve_collisions"),
    "pack_sessions": ("test_pack_sessions",),
    "retriever": ("test_retriever",),
    "products": ("test_matmul", "test_onednn"),
    "embedding_gradient": ("test_embedding_gradient",),
    "token_merger": ("test_token_merger",),
    "catalogue_store": ("test_catalogue_store",),
}


@dataclass(frozen=True)
class Mutant:
    """``old`` is replaced by ``new`` in ``file``: ``fault`` says in words what is then wrong."""

    fault: str
    op: str
    file: str
    old: str
    new: str

    @property
    def tests(self) -> tuple[str, ...]:
        return tuple(f"python_tests/{name}.py" for name in TESTS[self.op])

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.old}\0{self.new}".encode()).hexdigest()[:16]  # whatever its file is called

    def applied_to(self, text: str) -> str:
        """The file's text with the fault.

        Raises:
            ValueError: the text to be replaced is not there exactly once: the list is stale.
        """
        if text.count(self.old) != 1:
            raise ValueError(f"'{self.fault}' is stale: its text is in {self.file} {text.count(self.old)} times, not 1")
        return text.replace(self.old, self.new)


MUTANTS = [
    Mutant(
        fault="among equal scores the higher parent comes first",
        op="beam_search",
        file="csrc/beam_search/best.cpp",
        old="[](const Candidate& a, const Candidate& b) { return a.key > b.key; }",
        new="[](const Candidate& a, const Candidate& b) {\n"
        "                     return a.key > b.key || (a.key == b.key && a.parent > b.parent);\n"
        "                   }",
    ),
    Mutant(
        fault="the candidates of the last thread's beams are lost",
        op="beam_search",
        file="csrc/beam_search/beam_search.cpp",
        old="for (std::int64_t piece = 1; piece < pieces; ++piece)",
        new="for (std::int64_t piece = 1; piece + 1 < pieces; ++piece)",
    ),
    Mutant(
        fault="a child may score above its parent",
        op="beam_search",
        file="csrc/beam_search/beam_search_cpu.inl",
        old="scores[i] = score + (logp > 0.f ? 0.f : logp);",
        new="scores[i] = score + logp;",
    ),
    Mutant(
        fault="of several items of one SID the last is skipped",
        op="beam_search",
        file="csrc/trie/trie_ops.h",
        old="range.first + at - place)",
        new="range.first + at - place - (at > place && at + 1 == end))",
    ),
    Mutant(
        fault="no barrier before the warps' shares of a row are merged",
        op="beam_search, CUDA",
        file="csrc/beam_search/beam_kernels.cuh",
        old="  __syncthreads();\n  if (threadIdx.x == 0) {\n    LogSumExp s = parts[0];",
        new="  if (threadIdx.x == 0) {\n    LogSumExp s = parts[0];",
    ),
    Mutant(
        fault="no barrier between reading the keys and moving them to the front",
        op="beam_search, CUDA",
        file="csrc/beam_search/top_keys.cuh",
        old="        key[i] = at < used ? keys[at] : 0;\n      }\n      __syncthreads();",
        new="        key[i] = at < used ? keys[at] : 0;\n      }",
    ),
    Mutant(
        fault="parents are counted from the first beam of their tile",
        op="beam_search, CUDA",
        file="csrc/beam_search/beam_kernels.cuh",
        old="a.out_parents[out + slot] = beam + c.beam[0];",
        new="a.out_parents[out + slot] = c.beam[0];",
    ),
    Mutant(
        fault="of an odd number of features the last but one is read twice",
        op="linear_beam_step",
        file="csrc/child_logits/child_logits_cpu.inl",
        old="const std::int64_t last = first + size - 1;",
        new="const std::int64_t last = first + size - 2;",
    ),
    Mutant(
        fault="no barrier before the state's next piece overwrites the one before",
        op="linear_beam_step",
        file="csrc/child_logits/child_logits_cuda.cu",
        old="    __syncthreads();  // every warp is done with the piece before\n",
        new="",
    ),
    Mutant(
        fault="the log-sum-exps of the tiles are added up in the type of the hidden states",
        op="linear_beam_step",
        file="raddpo_ext/decoding/linear_beam_step.py",
        old="parts = hidden.new_empty((-(-vocab // step), rows), dtype=torch.float32)",
        new="parts = hidden.new_empty((-(-vocab // step), rows))",
    ),
    Mutant(
        fault="no room in a packed key for the symbol that says that a SID has ended",
        op="trie, build",
        file="csrc/trie_index/packing.h",
        old="bits[l] = bit_width(num_symbols[l] - 1 + absent);",
        new="bits[l] = bit_width(num_symbols[l] - 1);",
    ),
    Mutant(
        fault="hints of the zeros' places name the block after the right one",
        op="trie, build",
        file="csrc/trie_index/trie_block.cpp",
        old="hints[hint] = static_cast<std::uint32_t>(block);",
        new="hints[hint] = static_cast<std::uint32_t>(block + 1);",
    ),
    Mutant(
        fault="the largest item id may be there twice",
        op="trie, build",
        file="csrc/trie_index/trie_build.cpp",
        old="for (std::int64_t i = 1; i < n_; ++i)\n      if (rows[i] >> row_bits == rows[i - 1] >> row_bits)",
        new="for (std::int64_t i = 1; i + 1 < n_; ++i)\n      if (rows[i] >> row_bits == rows[i - 1] >> row_bits)",
    ),
    Mutant(
        fault="the carry from one word of nodes to the next is lost",
        op="trie, live",
        file="csrc/trie_index/trie_live_cpu.inl",
        old="carry = n < 64 ? total >> n : sum < run || total < sum;",
        new="carry = n < 64 ? total >> n : sum < run;",
    ),
    Mutant(
        fault="a second filter lets through what the first one took out",
        op="trie, live",
        file="csrc/trie_index/trie_live.cpp",
        old="& (old.live_items.bits ? old.live_items.bits[w] : valid);",
        new="& valid;",
    ),
    Mutant(
        fault="the rank of what is left leaves out a block's first word",
        op="trie, live",
        file="csrc/trie_index/trie_math.h",
        old="for (std::int64_t w = block * (kBlockBits / 64); w < word; ++w)",
        new="for (std::int64_t w = block * (kBlockBits / 64) + 1; w < word; ++w)",
    ),
    Mutant(
        fault="SIDs that both indexes hold are counted twice",
        op="trie, merge",
        file="csrc/trie_index/trie_merge_cpu.inl",
        old="out.sids += !place.found && end == begin;",
        new="out.sids += end == begin;",
    ),
    Mutant(
        fault="item ids of 64 bits are added to an index of 32 bits",
        op="trie, merge",
        file="csrc/trie_index/trie_merge.cpp",
        old="    shape.wide_items |= added.wide_items;\n",
        new="",
    ),
    Mutant(
        fault="an ignore_index that is a token id is not ignored",
        op="token_logps",
        file="csrc/token_logps/token_logps_math.h",
        old="if (token == a.ignore_index) return kIgnored;",
        new="if (token == a.ignore_index && token < 0) return kIgnored;",
    ),
    Mutant(
        fault="in place the target's logit is read after it is overwritten",
        op="token_logps",
        file="csrc/token_logps/token_logps_cpu.inl",
        old="  const A z = here ? row.at(target) : A(0);  // read before it is overwritten in place\n"
        "  write_softmax<D, transform>(row, {begin, end - begin}, g, lse, y);\n",
        new="  write_softmax<D, transform>(row, {begin, end - begin}, g, lse, y);\n"
        "  const A z = here ? row.at(target) : A(0);\n",
    ),
    Mutant(
        fault="the softmax runs over the next level's tokens",
        op="token_logps",
        file="raddpo_ext/logps/softmax_support.py",
        old="known = torch.where(outside, 0, levels)",
        new="known = torch.where(outside, 0, (levels + 1).clamp(max=num_levels - 1))",
    ),
    Mutant(
        fault="no barrier before the warps' sums of a row are merged",
        op="token_logps, CUDA",
        file="csrc/token_logps/token_logps_cuda.cu",
        old="    if (lane_id() == 0) parts[warp_id()] = sum;\n    __syncthreads();\n",
        new="    if (lane_id() == 0) parts[warp_id()] = sum;\n",
    ),
    Mutant(
        fault="the first block of a cluster does not wait for the others' sums",
        op="token_logps, CUDA",
        file="csrc/token_logps/token_logps_cuda.cu",
        old="    if (rank > 0) return;\n    cluster_wait();\n",
        new="    if (rank > 0) return;\n",
    ),
    Mutant(
        fault="NaN where every logit of the tiles so far is -inf",
        op="linear_token_logps",
        file="raddpo_ext/logps/linear_product.py",
        old="shift = both.masked_fill(both == -torch.inf, 0.0)",
        new="shift = both",
    ),
    Mutant(
        fault="tiles of rows add up to the weight's gradient in bfloat16",
        op="linear_token_logps",
        file="raddpo_ext/logps/linear_product.py",
        old="piece = linear(logits.T, hidden.T).to(gradients.sum_dtype)",
        new="piece = linear(logits.T, hidden.T)",
    ),
    Mutant(
        fault="the first token after a level's last counts as one of the level",
        op="linear_token_logps",
        file="raddpo_ext/logps/linear_parts.py",
        old="outside = (local < 0) | (local >= width)",
        new="outside = (local < 0) | (local > width)",
    ),
    Mutant(
        fault="NaN where every logit so far is -inf",
        op="row_lse",
        file="csrc/common/log_sum_exp.inl",
        old="const float shift = s.shift == -INFINITY ? 0.f : s.shift;",
        new="const float shift = s.shift;",
    ),
    Mutant(
        fault="the sum so far is not scaled to a new maximum",
        op="row_lse",
        file="csrc/common/log_sum_exp.inl",
        old="    s.sum *= fast_exp(shift - most);\n",
        new="",
    ),
    Mutant(
        fault="the pair weights are left out of the log-sum-exp",
        op="session_loss",
        file="csrc/session_loss/session_loss_cpu.inl",
        old="T x = sign * m.rewards[j] + fast_log(m.weights[j]);",
        new="T x = sign * m.rewards[j];",
    ),
    Mutant(
        fault="against a pool only the first positive's prefix is detached",
        op="session_loss",
        file="csrc/session_loss/session_loss_cpu.inl",
        old="} else if (a.protect == Protect::positives || a.positives == Positives::pooled) {",
        new="} else if (a.protect == Protect::positives) {",
    ),
    Mutant(
        fault="negatives that are impossible are smoothed",
        op="session_loss",
        file="csrc/session_loss/session_loss_math.h",
        old="const T derivative = argument == -INFINITY ? T(0) : sigmoid - smoothing;",
        new="const T derivative = sigmoid - smoothing;",
    ),
    Mutant(
        fault="no barrier before the gradient is divided by the number of positives",
        op="session_loss, CUDA",
        file="csrc/session_loss/session_loss_cuda.cu",
        old="    __syncthreads();  // the gradient is complete\n    T* gradient",
        new="    T* gradient",
    ),
    Mutant(
        fault="sessions beyond a block's threads are lost from the totals",
        op="session_loss, CUDA",
        file="csrc/session_loss/session_loss_cuda.cu",
        old="for (std::int64_t s = threadIdx.x; s < a.batch.sessions; s += kLossThreads) add(sums, w.sums[s]);",
        new="if (threadIdx.x < a.batch.sessions) add(sums, w.sums[threadIdx.x]);",
    ),
    Mutant(
        fault="quantiles are not interpolated",
        op="similarity_weighting",
        file="raddpo_ext/losses/similarity_weighting.py",
        old="low, high = ascending[below], ascending[math.ceil(rank)]",
        new="low, high = ascending[below], ascending[below]",
    ),
    Mutant(
        fault="similarities are appended in the reverse order of the ranks",
        op="similarity_weighting",
        file="raddpo_ext/losses/similarity_weighting.py",
        old="torch.cat(arrived)",
        new="torch.cat(arrived[::-1])",
    ),
    Mutant(
        fault="weights leave out the probability that a SID is drawn at all",
        op="sample_search",
        file="raddpo_ext/decoding/sample_search.py",
        old="log_weights = logps - (-torch.expm1(-(logps - threshold[:, None]).exp())).log()",
        new="log_weights = logps.clone()",
    ),
    Mutant(
        fault="the threshold is the last score that was drawn",
        op="sample_search",
        file="raddpo_ext/decoding/sample_search.py",
        old="threshold = state.perturbed[:, samples].clone()",
        new="threshold = state.perturbed[:, samples - 1].clone()",
    ),
    Mutant(
        fault="the root's children are drawn as if the best perturbed score were known to be 0",
        op="sample_search",
        file="raddpo_ext/decoding/sample_step.py",
        old="none = torch.full_like(start.scores, math.inf)",
        new="none = torch.full_like(start.scores, 0.0)",
    ),
    Mutant(
        fault="a child's own perturbed score stays if it is below its parent's",
        op="sample_search",
        file="csrc/sample_step/sample_step_math.h",
        old="return x == 0.f ? parent : parent - below;",
        new="return x == 0.f ? parent : score < parent ? score : parent - below;",
    ),
    Mutant(
        fault="the mean of the other rows is divided by the weight of all",
        op="group_advantages",
        file="csrc/group_advantages/group_advantages_math.h",
        old="without(m.weighted, row.weight * row.reward) / without(m.weight, row.weight);",
        new="without(m.weighted, row.weight * row.reward) / value_of(m.weight);",
    ),
    Mutant(
        fault="a match with the ground truth counts behind a token that differs",
        op="group_advantages",
        file="raddpo_ext/policy/group_advantages.py",
        old="        contiguous=contiguous,\n",
        new="        contiguous=False,\n",
    ),
    Mutant(
        fault="a code takes one row more than it has room for",
        op="assign_balanced",
        file="csrc/assign_balanced/assign_balanced_cpu.inl",
        old="const float distance = room[code] > 0 ? distances[code] : kNone;",
        new="const float distance = room[code] >= 0 ? distances[code] : kNone;",
    ),
    Mutant(
        fault="the codes under all prefixes share one table of what is free",
        op="assign_balanced",
        file="csrc/assign_balanced/assign_balanced_cpu.inl",
        old="(a.groups ? a.groups[row] : 0) * a.codes",
        new="0 * a.codes",
    ),
    Mutant(
        fault="a rollout that equals the last expert of its group counts twice",
        op="policy_loss",
        file="csrc/policy_loss/policy_loss_math.h",
        old="for (std::int64_t e = 0; a.use_experts && e < v.positives; ++e) {",
        new="for (std::int64_t e = 0; a.use_experts && e + 1 < v.positives; ++e) {",
    ),
    Mutant(
        fault="the ratio is that of tokens where it should be that of whole items",
        op="policy_loss",
        file="raddpo_ext/policy/policy_loss.py",
        old='ratio=_check.choice(ratio, "ratio", op.RATIO),',
        new='ratio=_check.choice(ratio, "ratio", op.RATIO) % 2,',
    ),
    Mutant(
        fault="a candidate's tokens are seen by the next candidate's first token",
        op="pack_sessions",
        file="csrc/pack_sessions/pack_sessions.h",
        old="out_.ends[row_ + path_.back()] = width();",
        new="out_.ends[row_ + path_.back()] = width() + 1;",
    ),
    Mutant(
        fault="the candidates of a session swap the states that predict them",
        op="pack_sessions",
        file="csrc/pack_sessions/pack_sessions.cpp",
        old="predictors[i] = first + pack.predictors[i];",
        new="predictors[i] = first + pack.predictors[(in.offsets[s] + in.offsets[s + 1] - 1 - c) * in.levels + "
        "i % in.levels];",
    ),
    Mutant(
        fault="beams see the ancestors of the slot that they are in, not of their parent's",
        op="retriever",
        file="raddpo_ext/integrations/decoders.py",
        old="ancestors = self.sees.gather(1, parents[..., None].expand(-1, -1, self.sees.shape[2]))",
        new="ancestors = self.sees[:, torch.arange(width, device=tokens.device) % self.sees.shape[1]]",
    ),
    Mutant(
        fault="the cache does not follow the beams",
        op="retriever",
        file="raddpo_ext/integrations/decoders.py",
        old="            self.reorder(rows)",
        new="            if len(rows) != len(self.mask):\n                self.reorder(rows)",
    ),
    Mutant(
        fault="a version is published before its checksum is verified",
        op="catalogue_store",
        file="raddpo_ext/index/catalogue_store.py",
        old="                TrieIndex.load(staged)\n",
        new="",
    ),
    Mutant(
        fault="a reader goes back to an older version",
        op="catalogue_store",
        file="raddpo_ext/index/catalogue_store.py",
        old="if at_hand is not None and version <= at_hand.version:",
        new="if at_hand is not None and version == at_hand.version:",
    ),
    Mutant(
        fault="every tile of a product has the first tile's bias",
        op="products",
        file="raddpo_ext/_matmul.py",
        old="None if bias is None else bias[tile]",
        new="None if bias is None else bias[: tile.stop - begin][: len(right[tile])]",
    ),
    Mutant(
        fault="a layer by oneDNN gives its bias the gradient of one row",
        op="products",
        file="raddpo_ext/integrations/onednn.py",
        old="grad.sum(0) if of_bias",
        new="grad[0] if of_bias",
    ),
    Mutant(
        fault="a layer by oneDNN ignores autocast",
        op="products",
        file="raddpo_ext/integrations/onednn.py",
        old='if not plain or torch.is_autocast_enabled("cpu"):',
        new="if not plain:",
    ),
    Mutant(
        fault="the padding's row of the embeddings learns",
        op="embedding_gradient",
        file="raddpo_ext/integrations/embedding_gradient.py",
        old="values = values.masked_fill((rows == ctx.padding_idx)[:, None], 0)",
        new="pass",
    ),
    Mutant(
        fault="a token beside merged SIDs reads the row of another token",
        op="token_merger",
        file="raddpo_ext/integrations/token_merger.py",
        old="first = torch.where(merged, places[:, 0], len(table) + token_rank)",
        new="first = torch.where(merged, places[:, 0], len(table) + token_rank // 2)",
    ),
    Mutant(
        fault="a token counts as forced by the number of its own children",
        op="pack_sessions",
        file="raddpo_ext/data/pack_sessions.py",
        old="index.child_ranges(nodes[:, :-1])[1] == 1",
        new="index.child_ranges(nodes[:, 1:])[1] == 1",
    ),
]
