// Top-k, alone or with top-p, in one launch: a cluster of blocks holds a row in its registers.
//
//   1. A bound that at least k tokens reach. Each warp sorts the maxima of its lanes; ceil(k / 32)
//      of its tokens reach the one of that place. Warps form 32 groups, of which the best warp
//      counts, so k tokens reach the smallest of the groups'.
//   2. Each block lists its tokens that reach the bound, some 200 for k = 300. The lists go to the
//      first block, with their perturbed scores.
//   3. The first block takes the best score, and counts the larger logits. Are they k, neither that
//      token is kept nor any with a smaller logit: it takes the best of the others, and so on. Each
//      try halves, on average, what it may still fail on. For top-p it selects as in sample.cu.
//
// Neighbouring tokens are dealt out, 128 to a warp, so that any 4096 meet all groups: the lists
// have room even if the logits descend with the index, or if all but a range of tokens are banned.
// They have none for thousands of equals; then the first block selects from the whole row, and all
// look for the best.
//
// The blocks meet three times, where launches would cost 3 us each.
#include <cfloat>

#include "common/cluster.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/tma.cuh"
#include "sampling/row.cuh"
#include "sampling/select.cuh"

namespace torchtune_fused {
namespace {

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

struct Shared {
  // Of each block.
  Barrier of_warps_full, counts_full;
  RowNoise noise;
  Bounds of_warps[kBlocks * kWarps];
  int list[kThreads];   // tokens
  int listed;           // perhaps more than there is room for
  int counts[kBlocks];  // what all have listed
  uint64_t kept_from;   // if there was no room
  SelectShared<kThreads> select;
  // Of the first block.
  Barrier inbox_full;
  Candidate inbox[kBlocks * kThreads];  // what all have listed
  uint32_t tried;                       // order of the logit with the best score
  int larger;                           // logits than that
  uint64_t best_of_blocks[kBlocks];     // if there was no room
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

// Lists the tokens whose logits are not below the bound: NaN never is. By whole warps.
template <int kQuads>
__device__ __forceinline__ void list_from(float bound, const float (&logits)[kQuads][4],
                                          int first_token, Shared& s) {
  uint64_t reach = 0;  // a bit for each of this lane's tokens
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint64_t reaches = !(logits[i][j] < bound);
      reach |= reaches << (4 * i + j);
    }
  }
  const int lane = threadIdx.x % 32, of_warp = __reduce_add_sync(~0u, __popcll(reach));
  int end = 0;
  if (lane == 0) end = atomicAdd(&s.listed, of_warp);
  end = __shfl_sync(~0u, end, 0);
  while (const uint32_t lanes = __ballot_sync(~0u, reach != 0)) {
    const int at = end + __popc(lanes & ((1u << lane) - 1)), bit = __ffsll(reach) - 1;
    if (reach != 0 && at < kThreads) s.list[at] = first_token + bit / 4 * kStride + bit % 4;
    reach &= reach - 1;
    end += __popc(lanes);
  }
}

// The best perturbed score of the k largest logits.
__device__ uint64_t best_of_top_k(int top_k, int n, Shared& s) {
  uint32_t orders[kBlocks] = {};  // of this thread's candidates
  uint64_t drawn[kBlocks] = {};
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const int place = i * kThreads + static_cast<int>(threadIdx.x);
    if (place >= n) break;
    orders[i] = static_cast<uint32_t>(s.inbox[place].rank >> 32);
    drawn[i] = s.inbox[place].drawn;
  }
  for (uint32_t discarded = 0;; discarded = s.tried) {  // these orders and all below
    uint64_t best[1] = {};
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (orders[i] > discarded) best[0] = max(best[0], drawn[i]);
    }
    block_max<kThreads>(best, s.select.of_warps);
    if (best[0] == 0) return 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if (drawn[i] == best[0]) s.tried = orders[i], s.larger = 0;
    }
    __syncthreads();
    int larger = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) larger += orders[i] > s.tried;
    larger = __reduce_add_sync(~0u, larger);
    if (threadIdx.x % 32 == 0 && larger > 0) atomicAdd(&s.larger, larger);
    __syncthreads();
    if (s.larger < top_k) return best[0];
  }
}

// A step finds no instruction of this kernel in a cache: what is rarely called is out of line.

// The best perturbed score of what both filters keep.
__device__ __noinline__ uint64_t best_of_nucleus(const SampleParams& p, float largest, int n,
                                                 Shared& s) {
  const auto rank_at = [&](int i) { return s.inbox[i].rank; };
  const uint64_t from = kept_from<kThreads, true>(p, n, rank_at, p.top_k, largest, s.select);
  return best_from(from, s.inbox, n, s.select);
}

// The rank from which tokens of a row are kept that the lists have no room for; -inf ranks 0.
__device__ __noinline__ uint64_t kept_of_row(const SampleParams& p, Shared& s, float largest) {
  const float* row = p.logits + static_cast<int64_t>(s.noise.row) * p.vocab;
  const auto rank_at = [&](int i) { return row[i] == -INFINITY ? 0 : rank_of(row[i], i); };
  return kept_from<kThreads, false>(p, p.vocab, rank_at, p.top_k, largest, s.select);
}

// The best perturbed score of a block's tokens from a rank on.
__device__ __noinline__ uint64_t best_of_block(const SampleParams& p, Shared& s, float largest,
                                               int first_token) {
  uint64_t best[1] = {};
  for (int token = first_token; token < p.vocab; token += kStride) {
    float logits[4];
    load_quad(p, s.noise.row, token, logits);
    const uint4 random = s.noise.of_quad(token);
    const uint32_t bits[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (logits[j] == -INFINITY || rank_of(logits[j], token + j) < s.kept_from) continue;
      best[0] = max(best[0], drawn_rank(p, logits[j], largest, bits[j], token + j));
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
  const int block = static_cast<int>(blockIdx.x), row = static_cast<int>(blockIdx.y);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 * kBlocks + block;  // of the cluster's
  if (threadIdx.x == 0) {
    s.listed = 0;
    init(s.of_warps_full, 1);
    init(s.counts_full, 1);
    init(s.inbox_full, 1);
    fence_init();
  }
  // It costs nothing ahead of the grid's end, and racecheck reports none of the stores above.
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive_and_expect(s.of_warps_full, sizeof(s.of_warps));
    arrive_and_expect(s.counts_full, sizeof(s.counts));
  }
  cluster_arrive();
  wait_for_grid();

  const int first_token = 4 * (warp * 32 + lane);
  float logits[kQuads][4];
#pragma unroll
  for (int i = 0; i < kQuads; ++i) load_quad(p, row, first_token + i * kStride, logits[i]);
  if (threadIdx.x == 0) s.noise = RowNoise(p, row);
  const Bounds of_warp = bounds_of_warp(logits, p.top_k);
  cluster_wait();
  if (lane < kBlocks) {
    store_async(in_block(shared_address(&s.of_warps[warp]), lane),
                float2{__uint_as_float(of_warp.largest), __uint_as_float(of_warp.reached)},
                in_block(shared_address(&s.of_warps_full), lane));
  }
  wait(s.of_warps_full, 0);

  const Bounds bounds = bounds_of_row(s.of_warps);
  const float largest = score_of_order(bounds.largest);
  const float bound = fmaxf(score_of_order(bounds.reached), -FLT_MAX);  // above -inf, and no NaN
  list_from(bound, logits, first_token, s);
  __syncthreads();
  const int listed = s.listed;
  if (threadIdx.x < kBlocks) {
    store_async(in_block(shared_address(&s.counts[block]), threadIdx.x), listed,
                in_block(shared_address(&s.counts_full), threadIdx.x));
  }
  ulonglong2 candidate = {};
  if (threadIdx.x < listed) {
    const int token = s.list[threadIdx.x];
    const float logit = p.logits[static_cast<int64_t>(row) * p.vocab + token];
    candidate = {rank_of(logit, token),
                 drawn_rank(p, logit, largest, s.noise.of_token(token), token)};
  }
  wait(s.counts_full, 0);
  bool fits = true;
  int before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    fits = fits && s.counts[i] <= kThreads;
    before += i < block ? s.counts[i] : 0;
    all += s.counts[i];
  }

  uint64_t best = 0;
  if (fits) {
    if (threadIdx.x < listed) {
      store_async(in_block(shared_address(&s.inbox[before + threadIdx.x]), 0), candidate,
                  in_block(shared_address(&s.inbox_full), 0));
    }
    if (block != 0) return;
    const int bytes_sent = all * static_cast<int>(sizeof(Candidate));
    if (threadIdx.x == 0) arrive_and_expect(s.inbox_full, bytes_sent);
    wait(s.inbox_full, 0);
    best = p.top_p < 1 ? best_of_nucleus(p, largest, all, s) : best_of_top_k(p.top_k, all, s);
  } else {
    if (block == 0) {
      const uint64_t from = kept_of_row(p, s, largest);
      if (threadIdx.x < kBlocks) *in_block(&s.kept_from, threadIdx.x) = from;
    }
    sync_cluster();
    best = best_of_block(p, s, largest, first_token);
    if (threadIdx.x == 0) *in_block(&s.best_of_blocks[block], 0) = best;
    sync_cluster();
    if (block != 0) return;
    for (const uint64_t other : s.best_of_blocks) best = max(best, other);
  }
  if (threadIdx.x != 0) return;
  p.tokens[row] = best == 0 ? 0 : token_of(best);  // 0: nothing but -inf
  if (p.rows == 1) p.rng_state[1] = static_cast<int64_t>(s.noise.offset + 1);
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
