// One token per row of logits: the largest, or the largest of logit / temperature + Gumbel noise,
// which is a draw from the softmax (the Gumbel-max trick; Maddison et al., 2014).
//
// Two launches: kSampleBlocks blocks per row find the best of their slices, one warp the best of
// those. The noise is Philox 4x32-10 (Salmon et al., 2011) at counter (vocabulary index / 4, row,
// offset) with the seed as key: a function of the state on the device alone, which the second
// launch advances, so that each replay of a captured graph draws anew.
#include "common/launch.h"
#include "common/ptx.cuh"
#include "sampling/sampling.h"

namespace torchtune_fused {
namespace {

constexpr int kSampleThreads = 256;

__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * counter.x, b = 0xCD9E8D57ull * counter.z;
    counter = {static_cast<uint32_t>(b >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(a)};
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

__device__ __forceinline__ float gumbel(uint32_t bits) {
  const float uniform = (static_cast<float>(bits >> 8) + 0.5f) * 0x1p-24f;
  return -logf(-logf(uniform));
}

// A number that orders like (score, then smaller index), NaN as the largest score, as in argmax.
__device__ __forceinline__ uint64_t rank_of(float score, int index) {
  uint32_t bits = score != score ? 0x7fffffffu : __float_as_uint(score);
  bits ^= bits >> 31 ? ~0u : 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | ~static_cast<uint32_t>(index);
}

__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(~0u, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Grid: (kSampleBlocks, rows). Each thread takes four neighbouring logits at a time.
__global__ void __launch_bounds__(kSampleThreads)
    best_of_slices_kernel(const __grid_constant__ SampleParams p) {
  launch_dependents();
  __shared__ uint64_t of_warp[kSampleThreads / 32];
  wait_for_grid();
  const float* logits = p.logits + static_cast<int64_t>(blockIdx.y) * p.vocab;
  const bool noisy = p.inverse_temperature != 0.f;
  const uint64_t seed = noisy ? p.rng_state[0] : 0, offset = noisy ? p.rng_state[1] : 0;
  uint64_t best = 0;
  for (int i = 4 * (blockIdx.x * kSampleThreads + threadIdx.x); i < p.vocab;
       i += 4 * kSampleBlocks * kSampleThreads) {
    uint32_t bits[4];
    if (noisy) {
      const uint4 random = philox({static_cast<uint32_t>(i / 4), blockIdx.y,
                                   static_cast<uint32_t>(offset),
                                   static_cast<uint32_t>(offset >> 32)},
                                  {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
      bits[0] = random.x, bits[1] = random.y, bits[2] = random.z, bits[3] = random.w;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (i + j >= p.vocab) break;
      float score = logits[i + j];
      if (noisy) score = score * p.inverse_temperature + gumbel(bits[j]);
      const uint64_t rank = rank_of(score, i + j);
      best = rank > best ? rank : best;
    }
  }
  best = warp_max(best);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x < 32) {
    best = warp_max(threadIdx.x < kSampleThreads / 32 ? of_warp[threadIdx.x] : 0);
    if (threadIdx.x == 0) p.best[blockIdx.y * kSampleBlocks + blockIdx.x] = best;
  }
}

// Grid: rows. Block: one warp.
__global__ void best_of_rows_kernel(const __grid_constant__ SampleParams p) {
  launch_dependents();
  wait_for_grid();
  uint64_t best = 0;
  for (int i = threadIdx.x; i < kSampleBlocks; i += 32) {
    const uint64_t rank = p.best[blockIdx.x * kSampleBlocks + i];
    best = rank > best ? rank : best;
  }
  best = warp_max(best);
  if (threadIdx.x != 0) return;
  p.tokens[blockIdx.x] = static_cast<uint32_t>(~best);
  if (blockIdx.x == 0 && p.inverse_temperature != 0.f) p.rng_state[1] += 1;
}

}  // namespace

void launch_sample(const SampleParams& p, cudaStream_t stream) {
  allow_shared_memory(best_of_slices_kernel, 0);
  allow_shared_memory(best_of_rows_kernel, 0);
  launch_chained(best_of_slices_kernel, dim3(kSampleBlocks, p.rows), kSampleThreads, 0, stream, p);
  launch_chained(best_of_rows_kernel, p.rows, 32, 0, stream, p);
}

}  // namespace torchtune_fused
