// The trie's lookups for torch: checks, allocation, threads and streams.
#include <tuple>

#include "trie_ops.h"
#include "trie_tensor.h"

namespace raddpo {

TrieView trie_view(const Tensor& trie, const Tensor& header, const char* op) {
  STD_TORCH_CHECK(trie.scalar_type() == ScalarType::Byte && trie.dim() == 1 && trie.is_contiguous(), op,
                  ": trie must be a contiguous vector of uint8");
  STD_TORCH_CHECK(header.scalar_type() == ScalarType::Long && header.is_cpu() && header.numel() == kHeaderWords &&
                      header.is_contiguous(),
                  op, ": header must be ", kHeaderWords, " int64 words on the CPU");
  const auto* h = header.const_data_ptr<std::int64_t>();
  const auto* data = static_cast<const std::uint8_t*>(trie.const_data_ptr());
  STD_TORCH_CHECK(h[kBytes] == trie.numel() && h[kLevels] >= 1 && h[kLevels] <= kMaxLevels, op,
                  ": header does not belong to trie");
  const auto section = [&](int word) -> const void* {
    STD_TORCH_CHECK(h[word] >= 0 && h[word] <= h[kBytes], op, ": header does not belong to trie");
    return data + h[word];
  };
  const auto sequence = [&](int word) {
    return DegreeSequence{static_cast<const std::uint64_t*>(section(word)),
                          static_cast<const std::uint32_t*>(section(word + 1)),
                          static_cast<const std::uint32_t*>(section(word + 2))};
  };
  TrieView t{};
  t.children = sequence(kChildBits);
  t.items = sequence(kItemBits);
  t.symbols = section(kSymbols);
  t.tokens = static_cast<const std::int32_t*>(section(kTokens));
  t.codes = static_cast<const std::int32_t*>(section(kCodes));
  for (int d = 0; d < kMaxLevels + 2; ++d) t.first_node[d] = h[kFirstNode + d];
  for (int l = 0; l < kMaxLevels; ++l) {
    t.num_symbols[l] = static_cast<std::int32_t>(h[kNumSymbols + l]);
    t.table[l] = static_cast<std::int32_t>(h[kTable + l]);
    t.first_token[l] = static_cast<std::int32_t>(h[kFirstToken + l]);
  }
  t.levels = static_cast<std::int32_t>(h[kLevels]);
  t.sid_levels = static_cast<std::int32_t>(h[kSidLevels]);
  t.wide = static_cast<std::int32_t>(h[kWide]);
  return t;
}

namespace {

constexpr std::int64_t kGrain = 256;

void check_nodes(const Tensor& t, const char* op, const char* argument) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous(), op, ": ", argument,
                  " must be contiguous int64");
}

struct Walk {
  Tensor nodes;
  TrieWalkArgs args;
};

Walk prepare_walk(const Tensor& tokens, const Tensor& trie, const Tensor& header) {
  check_nodes(tokens, "trie_walk", "tokens");
  STD_TORCH_CHECK(tokens.dim() == 2, "trie_walk: tokens must have shape (rows, columns)");
  Tensor nodes = new_empty(tokens, {tokens.size(0), tokens.size(1) + 1}, ScalarType::Long);
  return {nodes,
          {trie_view(trie, header, "trie_walk"), tokens.const_data_ptr<std::int64_t>(), tokens.size(0), tokens.size(1),
           nodes.mutable_data_ptr<std::int64_t>()}};
}

struct Paths {
  Tensor codes, depths;
  TriePathsArgs args;
};

Paths prepare_paths(const Tensor& nodes, const Tensor& trie, const Tensor& header, std::int64_t sid_levels) {
  check_nodes(nodes, "trie_paths", "nodes");
  const TrieView view = trie_view(trie, header, "trie_paths");
  STD_TORCH_CHECK(sid_levels == view.sid_levels, "trie_paths: sid_levels must be the index's, ", view.sid_levels);
  Tensor codes = new_empty(nodes, {nodes.numel(), view.sid_levels}, ScalarType::Long);
  Tensor depths = new_empty(nodes, {nodes.numel()}, ScalarType::Long);
  return {codes,
          depths,
          {view, nodes.const_data_ptr<std::int64_t>(), nodes.numel(), codes.mutable_data_ptr<std::int64_t>(),
           depths.mutable_data_ptr<std::int64_t>()}};
}

struct Ranges {
  Tensor first, count;
  TrieRangesArgs args;
};

Ranges prepare_ranges(const Tensor& nodes, const Tensor& trie, const Tensor& header, bool items) {
  const char* op = items ? "trie_items" : "trie_children";
  check_nodes(nodes, op, "nodes");
  Tensor first = new_empty(nodes, {nodes.numel()}, ScalarType::Long),
         count = new_empty(nodes, {nodes.numel()}, ScalarType::Long);
  return {first,
          count,
          {trie_view(trie, header, op), nodes.const_data_ptr<std::int64_t>(), nodes.numel(), items,
           first.mutable_data_ptr<std::int64_t>(), count.mutable_data_ptr<std::int64_t>()}};
}

Tensor trie_walk_cpu(const Tensor& tokens, const Tensor& trie, const Tensor& header) {
  const Walk c = prepare_walk(tokens, trie, header);
  parallel_for(c.args.rows, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) trie_walk_row(c.args, row);
  });
  return c.nodes;
}

std::tuple<Tensor, Tensor> trie_paths_cpu(const Tensor& nodes, const Tensor& trie, const Tensor& header,
                                          std::int64_t sid_levels) {
  const Paths c = prepare_paths(nodes, trie, header, sid_levels);
  parallel_for(c.args.count, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) trie_path(c.args, i);
  });
  return {c.codes, c.depths};
}

template <bool items>
std::tuple<Tensor, Tensor> trie_ranges_cpu(const Tensor& nodes, const Tensor& trie, const Tensor& header) {
  const Ranges c = prepare_ranges(nodes, trie, header, items);
  parallel_for(c.args.count, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) trie_range(c.args, i);
  });
  return {c.first, c.count};
}

#ifdef RADDPO_WITH_CUDA
Tensor trie_walk_cuda(const Tensor& tokens, const Tensor& trie, const Tensor& header) {
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  const Walk c = prepare_walk(tokens, trie, header);
  check_launch(cuda::trie_walk(c.args, current_cuda_stream(tokens.get_device_index())), "trie_walk");
  return c.nodes;
}

std::tuple<Tensor, Tensor> trie_paths_cuda(const Tensor& nodes, const Tensor& trie, const Tensor& header,
                                           std::int64_t sid_levels) {
  const torch::stable::accelerator::DeviceGuard guard(nodes.get_device_index());
  const Paths c = prepare_paths(nodes, trie, header, sid_levels);
  check_launch(cuda::trie_paths(c.args, current_cuda_stream(nodes.get_device_index())), "trie_paths");
  return {c.codes, c.depths};
}

template <bool items>
std::tuple<Tensor, Tensor> trie_ranges_cuda(const Tensor& nodes, const Tensor& trie, const Tensor& header) {
  const torch::stable::accelerator::DeviceGuard guard(nodes.get_device_index());
  const Ranges c = prepare_ranges(nodes, trie, header, items);
  check_launch(cuda::trie_ranges(c.args, current_cuda_stream(nodes.get_device_index())), "trie_ranges");
  return {c.first, c.count};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) {
  m.impl("trie_walk", TORCH_BOX(&trie_walk_cpu));
  m.impl("trie_paths", TORCH_BOX(&trie_paths_cpu));
  m.impl("trie_items", TORCH_BOX(&trie_ranges_cpu<true>));
  m.impl("trie_children", TORCH_BOX(&trie_ranges_cpu<false>));
}

#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) {
  m.impl("trie_walk", TORCH_BOX(&trie_walk_cuda));
  m.impl("trie_paths", TORCH_BOX(&trie_paths_cuda));
  m.impl("trie_items", TORCH_BOX(&trie_ranges_cuda<true>));
  m.impl("trie_children", TORCH_BOX(&trie_ranges_cuda<false>));
}
#endif

}  // namespace raddpo
