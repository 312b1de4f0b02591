// Top-k, alone or with top-p, in one launch: a cluster of blocks holds a row in its registers.
//
//   1. A bound that at least k tokens reach. Each warp sorts the maxima of its lanes; ceil(k / 32)
//      of its tokens reach the one of that place. Warps form 32 groups, of which the best warp
//      counts, so k tokens reach the smallest of the groups'.
//   2. Each block lists its tokens that reach the bound, some 200 for k = 300, and sends them to
//      the first block, with their perturbed scores, and counts in bins between bound and largest.
//   3. The first block finds the bin in which the k-th lies. Tokens before it are kept, those
//      within are compared with each other, and p counts among what k keeps.
//
// Neighbouring tokens are dealt out, 128 to a warp, so that any 4096 meet all groups: the lists
// have room even if the logits descend with the index, or if all but a range of tokens are banned.
// They have none for thousands of equals; then the first block selects from the whole row, and all
// look for the best.
//
// The blocks meet three times, where launches would cost 3 us each.
#include <cooperative_groups.h>

#include <cfloat>
#include <utility>

#include "common/cluster.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/tma.cuh"
#include "sampling/row.cuh"
#include "sampling/select.cuh"

namespace torchtune_fused {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 8;                       // of a cluster
constexpr int kStride = 4 * kThreads * kBlocks;  // from one quad of a thread to the next
constexpr int kGroups = 32;                      // of the cluster's warps
static_assert(kClusterTopK <= 32 * kGroups, "a warp has 32 lanes' maxima");

struct Bounds {
  uint32_t largest;  // order_of the largest logit
  uint32_t reached;  // of one that enough tokens reach
};

struct Listed {
  float logit;
  int token;
};

struct Shared {
  // Of each block.
  Barrier of_warps_full;
  RowNoise noise;
  Bounds of_warps[kBlocks * kWarps];
  Listed list[kThreads];
  int listed;           // perhaps more than there is room for
  int counts[kBlocks];  // what all have listed
  uint64_t kept_from;   // if there was no room
  SelectShared<kThreads> select;
  // Of the first block: what all send, by block, then what it makes of that.
  Candidate inbox[kBlocks][kThreads];
  uint32_t histogram[kThreads];
  uint32_t rivals[kBlocks * kThreads];  // orders of the tokens in the bin of the k-th
  Candidate kept[kBlocks * kThreads];
  int num_rivals, num_kept;
  uint64_t best_of_blocks[kBlocks];  // if there was no room
};

// The bins of the histogram, from the largest logit down to the bound.
struct Bins {
  uint32_t largest;
  int shift;

  __device__ Bins(uint32_t largest, uint32_t bound) : largest(largest) {
    shift = 32 - __clz(static_cast<int>((largest - bound) / kThreads));
  }
  __device__ int of(uint32_t order) const { return static_cast<int>((largest - order) >> shift); }
};

// NaN if one is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// The lanes' values in descending order (a bitonic sort).
__device__ __forceinline__ uint32_t sort_in_warp(uint32_t value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int size = 2; size <= 32; size *= 2) {
#pragma unroll
    for (int step = size / 2; step > 0; step /= 2) {
      const uint32_t other = __shfl_xor_sync(~0u, value, step);
      const bool takes_larger = ((lane & size) == 0) == ((lane & step) == 0);
      value = takes_larger ? max(value, other) : min(value, other);
    }
  }
  return value;
}

template <int kQuads>
__device__ __forceinline__ Bounds bounds_of_warp(const float (&logits)[kQuads][4], int top_k) {
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) largest = max_or_nan(largest, logits[i][j]);
  }
  const uint32_t sorted = sort_in_warp(order_of(largest));
  return {__shfl_sync(~0u, sorted, 0), __shfl_sync(~0u, sorted, (top_k - 1) / kGroups)};
}

// By whole warps.
__device__ __forceinline__ Bounds bounds_of_row(const Bounds (&of_warps)[kBlocks * kWarps]) {
  Bounds of_group = {};
#pragma unroll
  for (int i = threadIdx.x % 32; i < kBlocks * kWarps; i += kGroups) {
    of_group.largest = max(of_group.largest, of_warps[i].largest);
    of_group.reached = max(of_group.reached, of_warps[i].reached);
  }
  return {__reduce_max_sync(~0u, of_group.largest), __reduce_min_sync(~0u, of_group.reached)};
}

// Lists the logits that are not below the bound: NaN never is.
template <int kQuads>
__device__ __forceinline__ void list_from(float bound, const float (&logits)[kQuads][4],
                                          int first_token, Shared& s) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) count += !(logits[i][j] < bound);
  }
  if (count == 0) return;
  int at = atomicAdd(&s.listed, count);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (logits[i][j] < bound) continue;
      if (at < kThreads) s.list[at] = {logits[i][j], first_token + i * kStride + j};
      ++at;
    }
  }
}

// The best perturbed score of what is kept of the inbox. A thread takes a place of each block's
// part.
__device__ uint64_t best_of_inbox(const SampleParams& p, Shared& s, const Bins& bins) {
  const auto for_each = [&](auto use) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (threadIdx.x < s.counts[block]) use(s.inbox[block][threadIdx.x]);
    }
  };
  const uint64_t in_bin[1] = {s.histogram[threadIdx.x]};
  const Scan scan = block_scan<kThreads>(in_bin[0], s.select.of_warps[0]);
  const Crossing at = find_crossing(in_bin, scan.before, p.top_k, &s.select.crossing);
  const int last = at.bin < 0 ? kThreads : at.bin;
  for_each([&](const Candidate& candidate) {
    const uint32_t order = static_cast<uint32_t>(candidate.rank >> 32);
    if (bins.of(order) == last) s.rivals[atomicAdd(&s.num_rivals, 1)] = order;
  });
  __syncthreads();

  uint64_t best[1] = {};
  for_each([&](const Candidate& candidate) {
    const uint32_t order = static_cast<uint32_t>(candidate.rank >> 32);
    if (bins.of(order) > last) return;
    if (bins.of(order) == last) {
      int ahead = static_cast<int>(at.before);
      for (int i = 0; i < s.num_rivals; ++i) ahead += s.rivals[i] > order;
      if (ahead >= p.top_k) return;
    }
    if (p.top_p < 1) {
      s.kept[atomicAdd(&s.num_kept, 1)] = candidate;
    } else {
      best[0] = max(best[0], candidate.drawn);
    }
  });
  block_max<kThreads>(best, s.select.of_warps);
  if (p.top_p == 1 || s.num_kept == 0) return best[0];
  const uint64_t from = nucleus_from<kThreads, true>(
      p, 0, s.num_kept, [&](int i) { return s.kept[i].rank; }, score_of_order(bins.largest),
      s.select);
  return best_from(from, s.kept, s.num_kept, s.select);
}

// The rank from which tokens of a row are kept that the lists have no room for; -inf ranks 0.
__device__ uint64_t kept_of_row(const SampleParams& p, Shared& s, float largest) {
  const float* row = p.logits + static_cast<int64_t>(s.noise.row) * p.vocab;
  const auto rank_at = [&](int i) { return row[i] == -INFINITY ? 0 : rank_of(row[i], i); };
  return kept_from(p, p.vocab, rank_at, p.top_k, largest, s.select);
}

// The best perturbed score of a block's tokens from a rank on.
template <int kQuads>
__device__ uint64_t best_of_block(const SampleParams& p, Shared& s, uint64_t first, float largest,
                                  const float (&logits)[kQuads][4], int first_token) {
  uint64_t best[1] = {};
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const int token = first_token + i * kStride;
    const uint4 random = s.noise.of_quad(token);
    const uint32_t bits[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (logits[i][j] == -INFINITY || rank_of(logits[i][j], token + j) < first) continue;
      best[0] = max(best[0], drawn_rank(p, logits[i][j], largest, bits[j], token + j));
    }
  }
  block_max<kThreads>(best, s.select.of_warps);
  return best[0];
}

// Grid: (kBlocks, rows).
template <int kQuads>
__global__ void __launch_bounds__(kThreads, 1)
    top_k_kernel(const __grid_constant__ SampleParams p) {
  launch_dependents();
  extern __shared__ __align__(16) unsigned char bytes[];
  Shared& s = *reinterpret_cast<Shared*>(bytes);
  const cg::cluster_group cluster = cg::this_cluster();
  Shared& first = *cluster.map_shared_rank(&s, 0);
  const int block = static_cast<int>(blockIdx.x), row = static_cast<int>(blockIdx.y);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 * kBlocks + block;  // of the cluster's
  s.histogram[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    s.listed = s.num_rivals = s.num_kept = 0;
    init(s.of_warps_full, 1);
    fence_init();
  }
  // It costs nothing ahead of the grid's end, and racecheck reports none of the stores above.
  __syncthreads();
  if (threadIdx.x == 0) arrive_and_expect(s.of_warps_full, sizeof(s.of_warps));
  cg::cluster_group::arrival_token started = cluster.barrier_arrive();
  wait_for_grid();

  const int first_token = 4 * (warp * 32 + lane);
  float logits[kQuads][4];
#pragma unroll
  for (int i = 0; i < kQuads; ++i) load_quad(p, row, first_token + i * kStride, logits[i]);
  if (threadIdx.x == 0) s.noise = RowNoise(p, row);
  const Bounds of_warp = bounds_of_warp(logits, p.top_k);
  cluster.barrier_wait(std::move(started));
  if (lane < kBlocks) {
    store_async(in_block(shared_address(&s.of_warps[warp]), lane),
                float2{__uint_as_float(of_warp.largest), __uint_as_float(of_warp.reached)},
                in_block(shared_address(&s.of_warps_full), lane));
  }
  wait(s.of_warps_full, 0);

  const Bounds bounds = bounds_of_row(s.of_warps);
  const float largest = score_of_order(bounds.largest);
  const float bound = fmaxf(score_of_order(bounds.reached), -FLT_MAX);  // above -inf, and no NaN
  const Bins bins(bounds.largest, order_of(bound));
  list_from(bound, logits, first_token, s);
  __syncthreads();
  if (threadIdx.x < s.listed) {
    const auto [logit, token] = s.list[threadIdx.x];
    atomicAdd(&first.histogram[bins.of(order_of(logit))], 1u);
    first.inbox[block][threadIdx.x] = {
        rank_of(logit, token), drawn_rank(p, logit, largest, s.noise.of_token(token), token)};
  }
  if (threadIdx.x < kBlocks) cluster.map_shared_rank(s.counts, threadIdx.x)[block] = s.listed;
  cluster.sync();

  bool fits = true;
  for (const int count : s.counts) fits = fits && count <= kThreads;
  uint64_t best = 0;
  if (fits) {
    if (block != 0) return;
    best = best_of_inbox(p, s, bins);
  } else {
    if (block == 0) {
      const uint64_t from = kept_of_row(p, s, largest);
      if (threadIdx.x < kBlocks) cluster.map_shared_rank(&s, threadIdx.x)->kept_from = from;
    }
    cluster.sync();
    best = best_of_block(p, s, s.kept_from, largest, logits, first_token);
    if (threadIdx.x == 0) first.best_of_blocks[block] = best;
    cluster.sync();
    if (block != 0) return;
    for (const uint64_t other : s.best_of_blocks) best = max(best, other);
  }
  if (threadIdx.x != 0) return;
  p.tokens[row] = best == 0 ? 0 : token_of(best);  // 0: nothing but -inf
  if (p.rows == 1) p.rng_state[1] += 1;
}

// Once all rows have drawn.
__global__ void advance_kernel(int64_t* rng_state) {
  launch_dependents();
  wait_for_grid();
  rng_state[1] += 1;
}

}  // namespace

void launch_top_k(const SampleParams& p, cudaStream_t stream) {
  static_assert(kClusterVocab == 16 * kStride);
  const auto kernel = p.vocab <= 8 * kStride ? top_k_kernel<8> : top_k_kernel<16>;
  allow_shared_memory(kernel, sizeof(Shared));
  launch_in_clusters(kernel, true, kBlocks, dim3(kBlocks, p.rows), kThreads, sizeof(Shared), stream,
                     p);
  if (p.rows > 1) {
    allow_shared_memory(advance_kernel, 0);
    launch_waiting(advance_kernel, 1, 1, 0, stream, p.rng_state);
  }
}

}  // namespace torchtune_fused
