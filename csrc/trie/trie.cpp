// The trie's lookups for torch: checks, allocation, threads and streams.
#include <algorithm>
#include <tuple>

#include "../common/isa.h"
#include "../trie_index/trie_check.h"
#include "trie_ops.h"
#include "trie_tensor.h"

namespace raddpo {

TrieView trie_view(const Tensor& trie, const Tensor& header, const OptionalTensor& live, const char* op) {
  STD_TORCH_CHECK(trie.scalar_type() == ScalarType::Byte && trie.dim() == 1 && trie.is_contiguous(), op,
                  ": trie must be a contiguous vector of uint8");
  STD_TORCH_CHECK(header.scalar_type() == ScalarType::Long && header.is_cpu() && header.numel() == kHeaderWords &&
                      header.is_contiguous(),
                  op, ": header must be ", kHeaderWords, " int64 words on the CPU");
  const auto* h = header.const_data_ptr<std::int64_t>();
  STD_TORCH_CHECK(h[kBytes] == trie.numel() && h[kLevels] >= 1 && h[kLevels] <= kMaxLevels, op,
                  ": header does not belong to trie");
  for (int word = kSymbols; word <= kCodes; ++word)
    STD_TORCH_CHECK(h[word] >= 0 && h[word] <= h[kBytes], op, ": header does not belong to trie");
  const std::uint8_t* bits = nullptr;
  if (live) {
    STD_TORCH_CHECK(live->scalar_type() == ScalarType::Byte && live->is_contiguous() &&
                        live->numel() == LiveLayout(h[kNumNodes], h[kNumItems]).bytes,
                    op, ": live does not belong to trie");
    bits = static_cast<const std::uint8_t*>(live->const_data_ptr());
  }
  return view_of(static_cast<const std::uint8_t*>(trie.const_data_ptr()), h, bits);
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

Walk prepare_walk(const Tensor& tokens, const Tensor& trie, const Tensor& header, const OptionalTensor& live) {
  check_device("trie_walk", {{"tokens", tokens}, {"trie", trie}, {"live", live}});
  check_nodes(tokens, "trie_walk", "tokens");
  STD_TORCH_CHECK(tokens.dim() == 2, "trie_walk: tokens must have shape (rows, columns)");
  Tensor nodes = new_empty(tokens, {tokens.size(0), tokens.size(1) + 1}, ScalarType::Long);
  return {nodes,
          {trie_view(trie, header, live, "trie_walk"), tokens.const_data_ptr<std::int64_t>(), tokens.size(0),
           tokens.size(1), nodes.mutable_data_ptr<std::int64_t>()}};
}

struct Paths {
  Tensor codes, depths;
  TriePathsArgs args;
};

Paths prepare_paths(const Tensor& nodes, const Tensor& trie, const Tensor& header, const OptionalTensor& live,
                    std::int64_t sid_levels) {
  check_device("trie_paths", {{"nodes", nodes}, {"trie", trie}, {"live", live}});
  check_nodes(nodes, "trie_paths", "nodes");
  const TrieView view = trie_view(trie, header, live, "trie_paths");
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

Ranges prepare_ranges(const Tensor& nodes, const Tensor& trie, const Tensor& header, const OptionalTensor& live,
                      bool items) {
  const char* op = items ? "trie_items" : "trie_children";
  check_device(op, {{"nodes", nodes}, {"trie", trie}, {"live", live}});
  check_nodes(nodes, op, "nodes");
  Tensor first = new_empty(nodes, {nodes.numel()}, ScalarType::Long),
         count = new_empty(nodes, {nodes.numel()}, ScalarType::Long);
  return {first,
          count,
          {trie_view(trie, header, live, op), nodes.const_data_ptr<std::int64_t>(), nodes.numel(), items,
           first.mutable_data_ptr<std::int64_t>(), count.mutable_data_ptr<std::int64_t>()}};
}

struct TopItems {
  Tensor items, owners;
  TrieTopItemsArgs args;
};

TopItems prepare_top_items(const Tensor& nodes, const Tensor& trie, const Tensor& header, const OptionalTensor& live,
                           std::int64_t top_k) {
  constexpr const char* op = "trie_top_items";
  check_device(op, {{"nodes", nodes}, {"trie", trie}, {"live", live}});
  check_nodes(nodes, op, "nodes");
  STD_TORCH_CHECK(nodes.dim() == 2 && top_k >= 0, op,
                  ": nodes must have shape (rows, columns) and top_k be at least 0");
  const TrieView view = trie_view(trie, header, live, op);
  const auto* h = header.const_data_ptr<std::int64_t>();
  Tensor items = new_empty(nodes, {nodes.size(0), top_k}, ScalarType::Long),
         owners = new_empty(nodes, {nodes.size(0), top_k}, ScalarType::Long);
  return {items,
          owners,
          {view, nodes.const_data_ptr<std::int64_t>(), nodes.size(0), nodes.size(1), top_k,
           static_cast<const std::uint8_t*>(trie.const_data_ptr()) + h[kItems], h[kItemBytes] == 8, h[kNumItems],
           items.mutable_data_ptr<std::int64_t>(), owners.mutable_data_ptr<std::int64_t>()}};
}

struct Select {
  Tensor numbers;
  TrieSelectArgs args;
};

Select prepare_select(const Tensor& places, const Tensor& trie, const Tensor& header, const OptionalTensor& live,
                      bool items) {
  check_device("trie_select", {{"places", places}, {"trie", trie}, {"live", live}});
  check_nodes(places, "trie_select", "places");
  const TrieView view = trie_view(trie, header, live, "trie_select");
  Tensor numbers = new_empty(places, {places.numel()}, ScalarType::Long);
  return {
      numbers,
      {items ? view.live_items : view.live_nodes, header.const_data_ptr<std::int64_t>()[items ? kNumItems : kNumNodes],
       places.const_data_ptr<std::int64_t>(), places.numel(), numbers.mutable_data_ptr<std::int64_t>()}};
}

Tensor trie_check_cpu(const Tensor& trie, std::int64_t threads) {
  STD_TORCH_CHECK(trie.is_cpu(), "trie_check: trie must be on the CPU");
  const auto* words = static_cast<const std::int64_t*>(trie.const_data_ptr());
  STD_TORCH_CHECK(trie.scalar_type() == ScalarType::Byte && trie.dim() == 1 && trie.is_contiguous() &&
                      reinterpret_cast<std::uintptr_t>(words) % sizeof *words == 0,
                  "trie_check: trie must be a contiguous vector of uint8, aligned to ", sizeof *words, " bytes");
  STD_TORCH_CHECK(threads >= 1 && threads <= 1024, "trie_check: threads must be in [1, 1024], got ", threads);
  trie_check(reinterpret_cast<const std::uint8_t*>(words), trie.numel(), static_cast<int>(threads));
  Tensor header = new_empty(trie, {kHeaderWords}, ScalarType::Long);
  std::copy_n(words, kHeaderWords, header.mutable_data_ptr<std::int64_t>());
  return header;
}

Tensor trie_walk_cpu(const Tensor& tokens, const Tensor& trie, const Tensor& header, const OptionalTensor& live) {
  const Walk c = prepare_walk(tokens, trie, header, live);
  parallel_for(c.args.rows, kGrain,
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(trie_walk, c.args, begin, end); });
  return c.nodes;
}

std::tuple<Tensor, Tensor> trie_paths_cpu(const Tensor& nodes, const Tensor& trie, const Tensor& header,
                                          const OptionalTensor& live, std::int64_t sid_levels) {
  const Paths c = prepare_paths(nodes, trie, header, live, sid_levels);
  parallel_for(c.args.count, kGrain,
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(trie_paths, c.args, begin, end); });
  return {c.codes, c.depths};
}

template <bool items>
std::tuple<Tensor, Tensor> trie_ranges_cpu(const Tensor& nodes, const Tensor& trie, const Tensor& header,
                                           const OptionalTensor& live) {
  const Ranges c = prepare_ranges(nodes, trie, header, live, items);
  parallel_for(c.args.count, kGrain,
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(trie_ranges, c.args, begin, end); });
  return {c.first, c.count};
}

std::tuple<Tensor, Tensor> trie_top_items_cpu(const Tensor& nodes, const Tensor& trie, const Tensor& header,
                                              const OptionalTensor& live, std::int64_t top_k) {
  const TopItems c = prepare_top_items(nodes, trie, header, live, top_k);
  const std::int64_t grain = std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, c.args.columns));
  parallel_for(c.args.rows, grain,
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(trie_top_items, c.args, begin, end); });
  return {c.items, c.owners};
}

Tensor trie_select_cpu(const Tensor& places, const Tensor& trie, const Tensor& header, const OptionalTensor& live,
                       bool items) {
  const Select c = prepare_select(places, trie, header, live, items);
  parallel_for(c.args.count, kGrain,
               [&](std::int64_t begin, std::int64_t end) { RADDPO_CALL_ISA(trie_select, c.args, begin, end); });
  return c.numbers;
}

#ifdef RADDPO_WITH_CUDA
Tensor trie_walk_cuda(const Tensor& tokens, const Tensor& trie, const Tensor& header, const OptionalTensor& live) {
  const Walk c = prepare_walk(tokens, trie, header, live);
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  check_launch(cuda::trie_walk(c.args, current_cuda_stream(tokens.get_device_index())), "trie_walk");
  return c.nodes;
}

std::tuple<Tensor, Tensor> trie_paths_cuda(const Tensor& nodes, const Tensor& trie, const Tensor& header,
                                           const OptionalTensor& live, std::int64_t sid_levels) {
  const Paths c = prepare_paths(nodes, trie, header, live, sid_levels);
  const torch::stable::accelerator::DeviceGuard guard(nodes.get_device_index());
  check_launch(cuda::trie_paths(c.args, current_cuda_stream(nodes.get_device_index())), "trie_paths");
  return {c.codes, c.depths};
}

template <bool items>
std::tuple<Tensor, Tensor> trie_ranges_cuda(const Tensor& nodes, const Tensor& trie, const Tensor& header,
                                            const OptionalTensor& live) {
  const Ranges c = prepare_ranges(nodes, trie, header, live, items);
  const torch::stable::accelerator::DeviceGuard guard(nodes.get_device_index());
  check_launch(cuda::trie_ranges(c.args, current_cuda_stream(nodes.get_device_index())), "trie_ranges");
  return {c.first, c.count};
}

std::tuple<Tensor, Tensor> trie_top_items_cuda(const Tensor& nodes, const Tensor& trie, const Tensor& header,
                                               const OptionalTensor& live, std::int64_t top_k) {
  const TopItems c = prepare_top_items(nodes, trie, header, live, top_k);
  const torch::stable::accelerator::DeviceGuard guard(nodes.get_device_index());
  check_launch(cuda::trie_top_items(c.args, current_cuda_stream(nodes.get_device_index())), "trie_top_items");
  return {c.items, c.owners};
}

Tensor trie_select_cuda(const Tensor& places, const Tensor& trie, const Tensor& header, const OptionalTensor& live,
                        bool items) {
  const Select c = prepare_select(places, trie, header, live, items);
  const torch::stable::accelerator::DeviceGuard guard(places.get_device_index());
  check_launch(cuda::trie_select(c.args, current_cuda_stream(places.get_device_index())), "trie_select");
  return c.numbers;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(raddpo, CPU, m) {
  m.impl("trie_check", TORCH_BOX(&trie_check_cpu));
  m.impl("trie_walk", TORCH_BOX(&trie_walk_cpu));
  m.impl("trie_paths", TORCH_BOX(&trie_paths_cpu));
  m.impl("trie_items", TORCH_BOX(&trie_ranges_cpu<true>));
  m.impl("trie_children", TORCH_BOX(&trie_ranges_cpu<false>));
  m.impl("trie_top_items", TORCH_BOX(&trie_top_items_cpu));
  m.impl("trie_select", TORCH_BOX(&trie_select_cpu));
}

#ifdef RADDPO_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(raddpo, CUDA, m) {
  m.impl("trie_walk", TORCH_BOX(&trie_walk_cuda));
  m.impl("trie_paths", TORCH_BOX(&trie_paths_cuda));
  m.impl("trie_items", TORCH_BOX(&trie_ranges_cuda<true>));
  m.impl("trie_children", TORCH_BOX(&trie_ranges_cuda<false>));
  m.impl("trie_top_items", TORCH_BOX(&trie_top_items_cuda));
  m.impl("trie_select", TORCH_BOX(&trie_select_cuda));
}
#endif

}  // namespace raddpo
