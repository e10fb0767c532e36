// pack_sessions for torch: checks, and the packed rows as padded tensors. Batches are collated on the CPU, so it runs
// there only.
#include "pack_sessions.h"

#include <tuple>

#include "../common/tensor.h"

namespace raddpo {
namespace {

using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

const std::int64_t* data_of(const Tensor& t, const char* name, std::int64_t size) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() == size,
                  "pack_sessions: ", name, " must be contiguous int64 of ", size, " elements");
  return t.const_data_ptr<std::int64_t>();
}

PackInput prepare(const Tensor& prompts, const Tensor& prompt_begins, const Tensor& prompt_lengths,
                  const Tensor& tokens, const Tensor& lengths, const Tensor& offsets, bool trie, bool last_token) {
  check_device("pack_sessions", {{"prompts", prompts},
                                 {"prompt_begins", prompt_begins},
                                 {"prompt_lengths", prompt_lengths},
                                 {"tokens", tokens},
                                 {"lengths", lengths},
                                 {"offsets", offsets}});
  STD_TORCH_CHECK(tokens.dim() == 2, "pack_sessions: tokens must have shape (candidates, levels)");
  PackInput in{};
  in.sessions = prompt_begins.numel();
  in.candidates = tokens.size(0);
  in.levels = tokens.size(1);
  in.prompts = data_of(prompts, "prompts", prompts.numel());
  in.prompt_begins = data_of(prompt_begins, "prompt_begins", in.sessions);
  in.prompt_lengths = data_of(prompt_lengths, "prompt_lengths", in.sessions);
  in.tokens = data_of(tokens, "tokens", in.candidates * in.levels);
  in.lengths = data_of(lengths, "lengths", in.candidates);
  in.offsets = data_of(offsets, "offsets", in.sessions + 1);
  in.trie = trie;
  in.last_token = last_token;
  for (std::int64_t s = 0; s < in.sessions; ++s) {
    const std::int64_t begin = in.prompt_begins[s], length = in.prompt_lengths[s];
    STD_TORCH_CHECK(begin >= 0 && length >= 1 && length <= prompts.numel() - begin, "pack_sessions: prompt ", s,
                    " is empty or outside of prompts");
    STD_TORCH_CHECK(in.offsets[s] >= 0 && in.offsets[s] <= in.offsets[s + 1],
                    "pack_sessions: offsets must be non-decreasing");
  }
  STD_TORCH_CHECK(in.offsets[0] == 0 && in.offsets[in.sessions] == in.candidates,
                  "pack_sessions: offsets must run from 0 to the number of candidates");
  for (std::int64_t c = 0; c < in.candidates; ++c)
    STD_TORCH_CHECK(in.lengths[c] >= 0 && in.lengths[c] <= in.levels, "pack_sessions: lengths[", c, "] must be in [0, ",
                    in.levels, "], got ", in.lengths[c]);
  return in;
}

Packed pack_sessions_cpu(const Tensor& prompts, const Tensor& prompt_begins, const Tensor& prompt_lengths,
                         const Tensor& tokens, const Tensor& lengths, const Tensor& offsets, bool trie, bool last_token,
                         bool pad_left, std::int64_t pad_token_id, std::int64_t multiple_of) {
  STD_TORCH_CHECK(multiple_of >= 1, "pack_sessions: multiple_of must be at least 1");
  const PackInput in = prepare(prompts, prompt_begins, prompt_lengths, tokens, lengths, offsets, trie, last_token);
  const Pack pack = Packer(in).run();

  std::int64_t width = 1;
  for (std::int64_t s = 0; s < in.sessions; ++s) width = std::max(width, pack.row_begins[s + 1] - pack.row_begins[s]);
  width = ((width - 1) / multiple_of + 1) * multiple_of;
  const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
    return new_empty(tokens, {rows, columns}, ScalarType::Long);
  };
  Packed out{matrix(in.sessions, width),
             matrix(in.sessions, width),
             matrix(in.sessions, width),
             matrix(in.candidates, in.levels),
             new_empty(tokens, {in.candidates}, ScalarType::Long),
             new_empty(tokens, {in.sessions}, ScalarType::Long)};
  auto* ids = std::get<0>(out).mutable_data_ptr<std::int64_t>();
  auto* positions = std::get<1>(out).mutable_data_ptr<std::int64_t>();
  auto* ends = std::get<2>(out).mutable_data_ptr<std::int64_t>();
  auto* predictors = std::get<3>(out).mutable_data_ptr<std::int64_t>();
  auto* last_tokens = std::get<4>(out).mutable_data_ptr<std::int64_t>();
  auto* prompt_starts = std::get<5>(out).mutable_data_ptr<std::int64_t>();
  for (std::int64_t s = 0; s < in.sessions; ++s) {
    const std::int64_t begin = pack.row_begins[s], used = pack.row_begins[s + 1] - begin;
    const std::int64_t shift = pad_left ? width - used : 0;
    prompt_starts[s] = shift;
    for (std::int64_t column = 0; column < width; ++column) {
      const std::int64_t to = s * width + column, from = column - shift;
      const bool real = from >= 0 && from < used;
      ids[to] = real ? pack.input_ids[begin + from] : pad_token_id;
      positions[to] = real ? pack.position_ids[begin + from] : 0;
      ends[to] = real ? pack.ends[begin + from] + shift
                      : column + 1;  // padding attends to itself: no row of a softmax is empty
    }
    const std::int64_t first = s * width + shift;
    for (std::int64_t c = in.offsets[s]; c < in.offsets[s + 1]; ++c) {
      last_tokens[c] = first + pack.last_tokens[c];
      for (std::int64_t i = c * in.levels; i < (c + 1) * in.levels; ++i) predictors[i] = first + pack.predictors[i];
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) { m.impl("pack_sessions", TORCH_BOX(&pack_sessions_cpu)); }

}  // namespace raddpo
