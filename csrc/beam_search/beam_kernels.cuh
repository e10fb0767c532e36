#pragma once
// The kernels of beam_step and sample_step, in two launches. The first reads every row of logits once, for its
// log-sum-exp, and looks up the beams' children. The second numbers a query's candidates, beam after beam and child
// after child, and cuts them into slices, one a block. A team of blocks finds the best of its slices (top_keys.cuh),
// and the team that ends last, where there are several, the best of all. `Args` are BeamStepArgs or SampleStepArgs;
// while sampling the first launch also finds the best child of each beam, which all its children's keys need.
#include <cmath>

#include "../trie/trie_warp.cuh"
#include "workspace.cuh"

namespace raddpo::cuda {
namespace {

template <typename D, typename Args>
__device__ __forceinline__ LogSumExp share_of_row(const Args& a, const typename D::T* row, int level, Range children,
                                                  int split, int splits) {
  const int thread = static_cast<int>(threadIdx.x);
  const TrieView& t = a.trie;
  std::int64_t size = a.vocab;
  if (a.normalize == Normalize::level) size = t.num_symbols[level];
  if (a.normalize == Normalize::trie) size = children.count;
  const unsigned chunk = static_cast<unsigned>(((size + splits - 1) / splits + 63) / 64 * 64);
  const unsigned begin = static_cast<unsigned>(split * chunk < size ? split * chunk : size);
  const unsigned end = static_cast<unsigned>(begin + chunk < size ? begin + chunk : size);
  const auto column = [&](unsigned i) { return column_of(a, level, symbol_of(t, node_at(t, children.first + i))); };
  if constexpr (kSamples<Args>)
    return share_of_tokens<D>(row, begin, end, thread, kReaders, column,
                              [&](float x) { return rounded_product(x, a.scale); });
  if (a.normalize == Normalize::trie) return share_of_tokens<D>(row, begin, end, thread, kReaders, column);
  if (a.normalize == Normalize::level && !in_sequence(a, level))
    return share_of_tokens<D>(row, begin, end, thread, kReaders, [&](unsigned i) { return token_of(t, level, i); });
  const std::int64_t first = a.normalize == Normalize::level ? first_column(a, level) : 0;
  return share_of_range<D>(row + first + begin, end - begin, thread, kReaders);
}

// One block a split of a row: 128 threads read the logits, coalesced and 8 x 16 bytes each in flight, while a warp
// walks the chain of dependent reads to the beam's children. Under `trie` every warp needs the children first.
template <typename D, typename Args>
__global__ void __launch_bounds__(kReaders + 32, 8)
    rows_kernel(const __grid_constant__ Args a, const __grid_constant__ Workspace w) {
  __shared__ LogSumExp parts[kReaders / 32];
  let_next_launch_begin();
  const TrieView& t = a.trie;
  const std::int64_t at = blockIdx.x / w.splits;
  const int split = static_cast<int>(blockIdx.x % w.splits);
  const float score = a.scores[at];
  const std::int64_t node = a.nodes[at];
  bool live = score > -INFINITY && is_node(t, node);
  if constexpr (kSamples<Args>) live = live && a.perturbed[at] > -INFINITY;
  const int level = live ? depth_of(t, node) : 0;
  const bool reads = threadIdx.x < kReaders, looks_up = !reads && split == 0;
  const bool inner = live && level < t.levels;
  Range children{0, 0};  // places among the nodes that are left
  bool finished = !inner;
  if (inner && (looks_up || (a.normalize == Normalize::trie && !a.lse))) {
    children = warp_children_of(t, node);
    finished = children.count == 0;
    children = live_of(t.live_nodes, children);
  }
  if (looks_up && lane_id() == 0) {
    if (at % a.width == 0) w.done[at / a.width] = 0;
    const std::int64_t count = finished ? live : has_columns(a, level) ? children.count : 0;
    w.beams[at] = {static_cast<std::uint32_t>(finished ? node : children.first), static_cast<std::uint32_t>(count),
                   finished ? -1 - level : level, score};
  }
  if (reads) {
    LogSumExp s{-INFINITY, 0.f};
    if (inner && a.lse) {
      const float lse = a.lse[at];
      if (threadIdx.x == 0) s = {lse, lse == lse ? 1.f : lse};  // merge passes a NaN on in the sum
    } else if (inner && (a.normalize == Normalize::vocab || has_columns(a, level))) {
      const auto* row =
          static_cast<const typename D::T*>(a.logits) + at / a.width * a.stride_batch + at % a.width * a.stride_beam;
      s = share_of_row<D>(a, row, level, children, split, w.splits);
    }
    s = warp_merge(s);
    if (lane_id() == 0) parts[warp_id()] = s;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    LogSumExp s = parts[0];
#pragma unroll
    for (int i = 1; i < kReaders / 32; ++i) s = merge(s, parts[i]);
    w.sums[blockIdx.x] = s;
    if constexpr (kSamples<Args>) parts[0] = s;
  }
  if constexpr (kSamples<Args>) {
    __syncthreads();
    const float lse = value_of(parts[0]);
    float most = -INFINITY;
    if (reads && inner && has_columns(a, level)) {
      const auto* row =
          static_cast<const typename D::T*>(a.logits) + at / a.width * a.stride_batch + at % a.width * a.stride_beam;
      for (std::int64_t i = threadIdx.x; i < children.count; i += kReaders) {
        const std::int64_t child = node_at(t, children.first + i);
        const float logit = load_logit<D>(row + column_of(a, level, symbol_of(t, child)));
        most = fmaxf(most, own_score(a, at / a.width, score, token_logp(a, logit, lse), child));
      }
    }
    __syncthreads();  // parts were read
    most = warp_reduce(most, [](float x, float y) { return fmaxf(x, y); });
    if (reads && lane_id() == 0) parts[warp_id()].max = most;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < kReaders / 32; ++i) most = fmaxf(most, parts[i].max);
      w.most[at] = most;
    }
  }
}

// Pushes every stripe of 512 of a query's candidates whose number is `slice` modulo `slices`, so that each slice has
// its share of the best beams. Leaves the tile loaded that the beams end with.
template <typename Args>
__device__ __forceinline__ void push_candidates(TopKeys& top, const Tile<Args>& tile, const Args& a, const Workspace& w,
                                                int query, std::uint32_t slice, std::uint32_t slices) {
  constexpr int n = kRound / kSliceThreads;
  const std::uint32_t stride = slices * kSliceThreads;
  std::uint32_t first = 0;
  for (int beam = 0; beam < a.width; beam += tile.size) {
    if (a.width > tile.size) load_tile(tile, a, w.beams, w.sums, w.most, w.splits, query, beam, first);
    const std::uint32_t next = tile.begin[tile.size], stripe = first / kSliceThreads;
    // The last of the slice's stripes that begins at the tile's first candidate or before, or its first one.
    std::uint32_t from = (stripe < slice ? slice : stripe - (stripe - slice) % slices) * kSliceThreads;
    for (; first < next && from < next; from += n * stride) {
      std::uint32_t candidate[n];
      bool inside[n];
      Key keys[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const std::uint32_t number = from + i * stride + threadIdx.x;
        inside[i] = number >= first && number < next;
        candidate[i] = inside[i] ? number : first;  // evaluated in vain: cheaper than a branch
      }
      const auto c = evaluate(a, tile, query, beam, candidate);
#pragma unroll
      for (int i = 0; i < n; ++i) keys[i] = inside[i] ? key_of(c.key[i], candidate[i]) : 0;
      top.push(keys);
    }
    first = next;
  }
}

// Pushes the keys of the lists that are this block's among its team, one list a warp at a time.
__device__ __forceinline__ void push_lists(TopKeys& top, const Workspace& w, int query, int slices) {
  constexpr int n = kRound / kSliceThreads, kWarps = kSliceThreads / 32;
  for (int first = 0; first < slices; first += kWarps * top.team.size) {
    const int slice = first + warp_id() * top.team.size + top.team.rank;
    const int count = slice < slices ? static_cast<int>(w.counts[query * w.slices + slice]) : 0;
    const Key* list = w.lists + (query * (w.slices + 1) + slice) * w.stride;
    for (int place = lane_id(); place - lane_id() < w.limit; place += n * 32) {
      Key keys[n];
#pragma unroll
      for (int i = 0; i < n; ++i) keys[i] = place + i * 32 < count ? list[place + i * 32] : 0;
      top.push(keys);
    }
  }
}

// Whether all other teams of the query have done what comes before; the last team then sees it.
__device__ __forceinline__ bool is_last_team(const Team& team, unsigned* done, std::int64_t teams, bool* last) {
  if (team.size == 1) return is_last_block(done, teams, last);
  team.sync();
  if (team.rank == 0 && threadIdx.x == 0) {
    const bool is_last = count_and_share(done) == teams - 1;
#pragma unroll
    for (int block = 0; block < kCluster; ++block) *shared_of(last, block) = is_last;
  }
  team.sync();
  return *last;
}

// Leaves what is best of all teams to the last one, which returns true; the others are done.
template <bool in_shared>
__device__ __forceinline__ bool merge_teams(TopKeys& top, const Workspace& w, int query, int team, int teams,
                                            bool* last) {
  const int slices = teams * top.team.size, slice = team * top.team.size + top.team.rank;
  Key* lists = w.lists + query * (w.slices + 1) * w.stride;
  // For short lists it costs more than it spares the last team.
  const Key share = top.shrink(w.want > kSliceThreads ? static_cast<int>(ceil_div(w.want, teams)) : 0);
  if (in_shared)
    for (int i = static_cast<int>(threadIdx.x); i < top.used; i += kSliceThreads)
      lists[slice * w.stride + i] = top.keys[i];
  if (threadIdx.x == 0) {
    w.counts[query * w.slices + slice] = top.used;
    w.bounds[query * w.slices + slice] = top.bound;
    w.shares[query * w.slices + slice] = share;
  }
  if (!is_last_team(top.team, &w.done[query], teams, last)) return false;
  // `want` keys reach the largest of the teams' bounds, and the smallest of their shares.
  const bool mine = static_cast<int>(threadIdx.x) < slices;
  const Key bound = mine ? w.bounds[query * w.slices + threadIdx.x] : 0;
  const Key least_share = mine ? w.shares[query * w.slices + threadIdx.x] : ~Key(0);
  const auto larger = [](Key x, Key y) { return x > y ? x : y; };
  const auto smaller = [](Key x, Key y) { return x < y ? x : y; };
  if (!in_shared) top.keys = lists + w.slices * w.stride;
  top.clear(larger(block_reduce<kSliceThreads>(bound, top.shared->key_scratch, larger),
                   block_reduce<kSliceThreads>(least_share, top.shared->key_scratch, smaller)));
  push_lists(top, w, query, slices);
  top.gather();
  return true;
}

// The next state: this block's share of the sorted keys, and of the empty slots.
template <typename Args>
__device__ __forceinline__ void write(const Team& team, const TopKeys::Share& share, const Tile<Args>& tile,
                                      const Args& a, const Workspace& w, int query) {
  const std::int64_t out = query * a.beam_width;
  for (std::int64_t slot = share.count + team.rank * kSliceThreads + threadIdx.x; slot < a.beam_width;
       slot += team.size * kSliceThreads) {
    a.out_scores[out + slot] = -INFINITY;
    a.out_tokens[out + slot] = -1;
    a.out_parents[out + slot] = 0;
    a.out_nodes[out + slot] = -1;
    if constexpr (kSamples<Args>) {
      a.out_perturbed[out + slot] = -INFINITY;
      a.out_logps[out + slot] = 0.f;
    }
  }
  std::uint32_t first = 0;
  for (int beam = 0; beam < a.width; beam += tile.size) {
    if (a.width > tile.size) load_tile(tile, a, w.beams, w.sums, w.most, w.splits, query, beam, first);
    const std::uint32_t next = tile.begin[tile.size];
    for (int slot = share.begin + static_cast<int>(threadIdx.x); slot < share.end; slot += kSliceThreads) {
      const std::uint32_t candidate[1] = {static_cast<std::uint32_t>(~share.keys[slot])};
      if (candidate[0] < first || candidate[0] >= next) continue;
      const auto c = evaluate(a, tile, query, beam, candidate);
      a.out_scores[out + slot] = c.score[0];
      a.out_tokens[out + slot] = c.token[0];
      a.out_parents[out + slot] = beam + c.beam[0];
      a.out_nodes[out + slot] = c.node[0];
      if constexpr (kSamples<Args>) {
        a.out_perturbed[out + slot] = c.key[0];
        a.out_logps[out + slot] = c.logp[0];
      }
    }
    first = next;
  }
}

// A query's candidates go to a block, if they are few, or to a cluster, or to as many clusters as they fill; blocks
// beyond them end at once. Without clusters blocks take their places. Symbols are read once and coalesced; logits were
// read by the launch before and come from the L2 cache.
template <bool in_shared, typename Args>
__global__ void __launch_bounds__(kSliceThreads, in_shared ? 2 : 1)
    slices_kernel(const __grid_constant__ Args a, const __grid_constant__ Workspace w) {
  auto& shared = *static_cast<SliceShared*>(dynamic_shared());
  const Tile<Args> tile(&shared + 1, shared.tile_scratch, w.tile);
  Key* buffer = reinterpret_cast<Key*>(reinterpret_cast<char*>(&shared + 1) + Tile<Args>::bytes(w.tile));
  const int rank = static_cast<int>(blockIdx.x % w.cluster);
  if (!kHasClusters && rank > 0) return;
  const int number = static_cast<int>(blockIdx.x) / w.cluster, batch = static_cast<int>(a.batch);
  const int query = number % batch, team = number / batch;
  wait_for_launch_before();
  std::uint64_t sum = 0;
  for (int beam = 0; beam < a.width; beam += tile.size)
    sum += load_tile(tile, a, w.beams, w.sums, w.most, w.splits, query, beam, sum);
  const std::uint32_t candidates = candidate_number(sum);
  const Team mine{kHasClusters && in_shared && candidates > w.few ? w.cluster : 1, rank};
  const int teams = static_cast<int>(teams_of(w, candidates, mine.size));
  if (rank >= mine.size || team >= teams) return;

  const int slices = teams * mine.size, slice = team * mine.size + rank;
  if (!in_shared) buffer = w.lists + (query * (w.slices + 1) + slice) * w.stride;
  TopKeys top{buffer, w.capacity, w.want, w.limit, &shared.top, mine};
  top.clear(0);
  push_candidates(top, tile, a, w, query, static_cast<std::uint32_t>(slice), static_cast<std::uint32_t>(slices));
  top.gather();
  if (teams > 1 && !merge_teams<in_shared>(top, w, query, team, teams, &shared.last)) return;
  const TopKeys::Share share = top.sorted();
  write(mine, share, tile, a, w, query);
}

template <typename D, typename Args>
int launch_rows(const Args& a, const Workspace& w, CUstream_st* stream) {
  const std::int64_t blocks = a.batch * a.width * w.splits;
  return blocks ? launch(rows_kernel<D, Args>, blocks, kReaders + 32, stream, a, w) : cudaSuccess;
}

template <typename Args>
int launch_step(const Args& a, void* workspace, CUstream_st* stream) {
  const Workspace w = lay_out(a, workspace);
  if (w.want == kMaxWidth) return cudaErrorInvalidValue;
  const int error = a.logit_type == LogitType::float32    ? launch_rows<Float32>(a, w, stream)
                    : a.logit_type == LogitType::bfloat16 ? launch_rows<BFloat16>(a, w, stream)
                                                          : launch_rows<Float16>(a, w, stream);
  if (error) return error;
  const Grid grid{a.batch * w.slices, kSliceThreads, w.cluster, w.shared_bytes, true};
  return launch(w.in_shared ? slices_kernel<true, Args> : slices_kernel<false, Args>, grid, stream, a, w);
}

}  // namespace
}  // namespace raddpo::cuda
