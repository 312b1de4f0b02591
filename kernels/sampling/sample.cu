// One token per row of logits: the largest, or the largest of logit / temperature + Gumbel noise
// among those that top-k and top-p keep, which is a draw from their softmax (the Gumbel-max trick;
// Maddison et al., 2014).
//
// Up to four launches, of a block per slice of a row but for the last:
//   best_of_slices   the largest logit, which greedy decoding wants, and all distances count from
//   histogram        tokens (top-k) or their mass (top-p), by distance from the largest logit
//   draw             finds the bin in which the limit of k or p lies. Tokens before it are kept:
//                    their best perturbed score is the block's result. Those within it are listed.
//   finish           selects exactly among the listed few, and takes the best of all
// With both filters, p counts among what k keeps, so draw lists all tokens up to k's bin. On 9.0,
// top_k_sm90.cu has one launch for all of this if k is not too large.
//
// The noise is Philox at counter (vocabulary index / 4, row, offset) with the seed as key: a
// function of the state on the device alone, which finish advances, so that each replay of a
// captured graph draws anew. Tokens at -inf are passed over; a row of nothing else, or one that
// holds NaN or inf, gives some token of the vocabulary.
#include "common/launch.h"
#include "common/ptx.cuh"
#include "sampling/row.cuh"
#include "sampling/select.cuh"

namespace torchtune_fused {
namespace {

constexpr int kThreads = 256;
constexpr int kFinishThreads = 1024;
constexpr int kQuads = kSliceTokens / (4 * kThreads);  // of neighbouring tokens, to a thread
constexpr int kBinsPerThread = kDistanceBins / kThreads;

// The first token of a thread's i-th quad. Grid: (slices, rows).
__device__ __forceinline__ int quad_start(int i) {
  return blockIdx.x * kSliceTokens + 4 * (i * kThreads + threadIdx.x);
}

__device__ __forceinline__ void load_slice(const SampleParams& p, float (&logits)[kQuads][4]) {
#pragma unroll
  for (int i = 0; i < kQuads; ++i) load_quad(p, blockIdx.y, quad_start(i), logits[i]);
}

// The largest of a row's results, one for each slice; in every warp.
__device__ __forceinline__ uint64_t best_of(const SampleParams& p, const uint64_t* of_slices,
                                            int row) {
  if (of_slices == nullptr) return 0;
  uint64_t best = 0;
  for (int i = threadIdx.x % 32; i < p.slices; i += 32) {
    best = max(best, of_slices[static_cast<int64_t>(row) * p.slices + i]);
  }
  return warp_max(best);
}

// Finer than 2% of the distance, from 2^-16 to 2^16; all orders survive, so the bins at the ends
// only make the list longer.
__device__ __forceinline__ int bin_of(float distance) {
  constexpr int kBinsPerOctave = 64, kFirst = (127 - 16) * kBinsPerOctave;
  const uint32_t scaled = __float_as_uint(distance) / ((1u << 23) / kBinsPerOctave);
  return min(max(static_cast<int>(scaled) - kFirst, 0), kDistanceBins - 1);
}

__global__ void __launch_bounds__(kThreads)
    best_of_slices_kernel(const __grid_constant__ SampleParams p) {
  launch_dependents();
  __shared__ uint64_t of_warps[1][kThreads / 32];
  wait_for_grid();
  float logits[kQuads][4];
  load_slice(p, logits);
  if (p.states != nullptr) {
    RowState& state = p.states[blockIdx.y];
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < kDistanceBins;
         i += gridDim.x * kThreads) {
      state.histogram[i] = 0;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) state.num_candidates = 0;
  }
  uint64_t best[1] = {};
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) best[0] = max(best[0], rank_of(logits[i][j], quad_start(i) + j));
  }
  block_max<kThreads>(best, of_warps);
  if (threadIdx.x == 0) p.best_logit[blockIdx.y * p.slices + blockIdx.x] = best[0];
}

__global__ void __launch_bounds__(kThreads)
    histogram_kernel(const __grid_constant__ SampleParams p) {
  launch_dependents();
  // Shared memory adds 32 bits at a time. Masses, at most 2^40, go in halves of 20 bits, of which
  // a slice sums at most 2^31.
  __shared__ uint32_t low[kDistanceBins], high[kDistanceBins];
  for (int i = threadIdx.x; i < kDistanceBins; i += kThreads) low[i] = high[i] = 0;
  wait_for_grid();
  float logits[kQuads][4];
  load_slice(p, logits);
  const float largest = score_of(best_of(p, p.best_logit, blockIdx.y));
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (logits[i][j] == -INFINITY) continue;
      const float distance = largest - logits[i][j];
      const int bin = bin_of(distance);
      if (p.top_k > 0) {
        atomicAdd(&low[bin], 1u);
      } else {
        const uint64_t mass = mass_of(distance, p.inverse_temperature);
        atomicAdd(&low[bin], static_cast<uint32_t>(mass & 0xfffff));
        atomicAdd(&high[bin], static_cast<uint32_t>(mass >> 20));
      }
    }
  }
  __syncthreads();
  auto* histogram = reinterpret_cast<unsigned long long*>(p.states[blockIdx.y].histogram);
  for (int i = threadIdx.x; i < kDistanceBins; i += kThreads) {
    const uint64_t sum = (static_cast<uint64_t>(high[i]) << 20) + low[i];
    if (sum != 0) atomicAdd(&histogram[i], sum);
  }
}

// Which bins of a row are kept as they are, and which are listed for finish to choose from.
struct Cut {
  int first_listed;
  int first_dropped;
};

__device__ Cut find_cut(const SampleParams& p, const uint64_t (&bins)[kBinsPerThread]) {
  __shared__ uint64_t of_warp[kThreads / 32];
  __shared__ Crossing crossing;
  uint64_t sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) sum += bins[i];
  const Scan scan = block_scan<kThreads>(sum, of_warp);
  const uint64_t target = p.top_k > 0 ? p.top_k : mass_to_keep(scan.total, p.top_p);
  const Crossing at = find_crossing(bins, scan.before, target, &crossing);
  const bool both = p.top_k > 0 && p.top_p < 1;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.states[blockIdx.y].remaining = target - (both || at.bin < 0 ? 0 : at.before);
  }
  const int last = at.bin < 0 ? kDistanceBins - 1 : at.bin;
  return {both ? 0 : at.bin < 0 ? kDistanceBins : last, last + 1};
}

__global__ void __launch_bounds__(kThreads) draw_kernel(const __grid_constant__ SampleParams p) {
  launch_dependents();
  __shared__ uint64_t of_warps[1][kThreads / 32];
  wait_for_grid();
  float logits[kQuads][4];
  load_slice(p, logits);
  const RowNoise noise(p, blockIdx.y);
  uint64_t histogram[kBinsPerThread] = {};
  if (p.states != nullptr) {
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      histogram[i] = p.states[blockIdx.y].histogram[threadIdx.x * kBinsPerThread + i];
    }
  }
  const float largest = score_of(best_of(p, p.best_logit, blockIdx.y));
  Cut cut = {kDistanceBins, kDistanceBins};
  if (p.states != nullptr) cut = find_cut(p, histogram);

  uint64_t best[1] = {};
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    int bins[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      bins[j] = logits[i][j] == -INFINITY ? kDistanceBins : bin_of(largest - logits[i][j]);
    }
    if (min(min(bins[0], bins[1]), min(bins[2], bins[3])) >= cut.first_dropped) continue;
    const uint4 random = noise.of_quad(quad_start(i));
    const uint32_t bits[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (bins[j] >= cut.first_dropped) continue;
      const int token = quad_start(i) + j;
      const uint64_t drawn = drawn_rank(p, logits[i][j], largest, bits[j], token);
      if (bins[j] < cut.first_listed) {
        best[0] = max(best[0], drawn);
      } else {
        auto* count = reinterpret_cast<unsigned long long*>(&p.states[blockIdx.y].num_candidates);
        p.candidates[static_cast<int64_t>(blockIdx.y) * p.vocab + atomicAdd(count, 1ull)] = {
            rank_of(logits[i][j], token), drawn};
      }
    }
  }
  block_max<kThreads>(best, of_warps);
  if (threadIdx.x == 0) p.best_drawn[blockIdx.y * p.slices + blockIdx.x] = best[0];
}

// The best perturbed score of the candidates that are kept. Only the block's first kBlock threads
// come here, and all get it.
template <int kBlock>
__device__ uint64_t best_candidate(const SampleParams& p, int n, float largest) {
  __shared__ SelectShared<kBlock> shared;
  const Candidate* candidates = p.candidates + static_cast<int64_t>(blockIdx.x) * p.vocab;
  const uint64_t first = kept_from<kBlock, false>(
      p, n, [=](int i) { return candidates[i].rank; }, p.states[blockIdx.x].remaining, largest,
      shared);
  return best_from(first, candidates, n, shared);
}

// Grid: rows. Block: kFinishThreads where something is filtered, else one warp.
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ SampleParams p) {
  launch_dependents();
  wait_for_grid();
  const int n = p.states == nullptr ? 0 : static_cast<int>(p.states[blockIdx.x].num_candidates);
  // A few warps wait less for each other; a long list, rare as it is, wants them all.
  const bool few = n <= 8 * kThreads;
  if (few && threadIdx.x >= kThreads) return;
  const uint64_t largest = best_of(p, p.best_logit, blockIdx.x);
  uint64_t best = best_of(p, p.best_drawn, blockIdx.x);
  if (n > 0) {
    const float top = score_of(largest);
    const uint64_t candidate =
        few ? best_candidate<kThreads>(p, n, top) : best_candidate<kFinishThreads>(p, n, top);
    best = max(best, candidate);
  }
  if (best == 0) best = largest;  // greedy, or a row of nothing but -inf
  if (threadIdx.x != 0) return;
  p.tokens[blockIdx.x] = token_of(best);
  if (blockIdx.x == 0 && p.best_drawn != nullptr) p.rng_state[1] += 1;
}

template <typename Kernel>
void launch(Kernel* kernel, dim3 grid, int threads, cudaStream_t stream, const SampleParams& p) {
  allow_shared_memory(kernel, 0);
  launch_waiting(kernel, grid, threads, 0, stream, p);
}

}  // namespace

void launch_sample(const SampleParams& p, cudaStream_t stream) {
  const dim3 slices(p.slices, p.rows);
  launch(best_of_slices_kernel, slices, kThreads, stream, p);
  if (p.states != nullptr) launch(histogram_kernel, slices, kThreads, stream, p);
  if (p.best_drawn != nullptr) launch(draw_kernel, slices, kThreads, stream, p);
  launch(finish_kernel, p.rows, p.states != nullptr ? kFinishThreads : 32, stream, p);
}

}  // namespace torchtune_fused
