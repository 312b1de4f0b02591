// The order of tokens, and sums over it.
#pragma once

#include <cstdint>

namespace torchtune_fused {

// A number that orders like the score, NaN as the largest, as in argmax. Never 0.
__device__ __forceinline__ uint32_t order_of(float score) {
  const uint32_t bits = score != score ? 0x7fffffffu : __float_as_uint(score + 0.f);  // -0 is 0
  return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}

__device__ __forceinline__ float score_of_order(uint32_t order) {
  return __uint_as_float(order ^ (order >> 31 ? 0x80000000u : ~0u));
}

// The same for (score, then smaller token).
__device__ __forceinline__ uint64_t rank_of(float score, int token) {
  return static_cast<uint64_t>(order_of(score)) << 32 | ~static_cast<uint32_t>(token);
}

__device__ __forceinline__ float score_of(uint64_t rank) {
  return score_of_order(static_cast<uint32_t>(rank >> 32));
}

__device__ __forceinline__ int token_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }

// exp(-distance / temperature) in units of 2^-40. Sums of integers do not depend on their order, so
// the same logits keep the same tokens in every run.
__device__ __forceinline__ uint64_t mass_of(float distance, float inverse_temperature) {
  const float mass = expf(-distance * inverse_temperature);
  return mass > 0 ? __float2ull_rn(mass * 0x1p40f) : 0;  // 0 for NaN too
}

__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
  const uint32_t high = static_cast<uint32_t>(value >> 32), low = static_cast<uint32_t>(value);
  const uint32_t highest = __reduce_max_sync(~0u, high);
  const uint32_t lowest = __reduce_max_sync(~0u, high == highest ? low : 0);
  return static_cast<uint64_t>(highest) << 32 | lowest;
}

// The maxima over the block of each of kValues, in all threads.
template <int kThreads, int kValues>
__device__ __forceinline__ void block_max(uint64_t (&values)[kValues],
                                          uint64_t (*shared)[kThreads / 32]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // `shared` may still be read from its last use
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = warp_max(values[i]);
    if (lane == 0) shared[i][warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = warp_max(lane < kThreads / 32 ? shared[i][lane] : 0);
  }
}

// The sum over this lane and those before it.
__device__ __forceinline__ uint64_t warp_scan(uint64_t value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, value, offset);
    if (threadIdx.x % 32 >= offset) value += other;
  }
  return value;
}

struct Scan {
  uint64_t before;  // sum over the threads before this one
  uint64_t total;
};

template <int kThreads>
__device__ __forceinline__ Scan block_scan(uint64_t value, uint64_t (&shared)[kThreads / 32]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint64_t in_warp = warp_scan(value);
  __syncthreads();  // `shared` may still be read from its last use
  if (lane == 31) shared[warp] = in_warp;
  __syncthreads();
  const uint64_t of_warps = warp_scan(lane < kThreads / 32 ? shared[lane] : 0);
  const uint64_t before_warp = __shfl_sync(~0u, of_warps, max(warp - 1, 0));
  return {(warp > 0 ? before_warp : 0) + in_warp - value, __shfl_sync(~0u, of_warps, 31)};
}

// The bin at which a running sum reaches its target.
struct Crossing {
  int bin;          // -1: nowhere
  uint64_t before;  // sum over the bins before it
};

// Of kBins bins to a thread, in the order of threads; `before` is the sum ahead of a thread's own.
template <int kBins>
__device__ __forceinline__ Crossing find_crossing(const uint64_t (&bins)[kBins], uint64_t before,
                                                  uint64_t target, Crossing* shared) {
  if (threadIdx.x == 0) *shared = {-1, 0};
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kBins; ++i) {
    if (before < target && target <= before + bins[i]) {
      *shared = {static_cast<int>(threadIdx.x) * kBins + i, before};
    }
    before += bins[i];
  }
  __syncthreads();
  return *shared;
}

// Tokens are kept while the mass before them is below this.
__device__ __forceinline__ uint64_t mass_to_keep(uint64_t total, double top_p) {
  const uint64_t target = static_cast<uint64_t>(ceil(top_p * static_cast<double>(total)));
  return target > 0 ? target : 1;  // the likeliest is always kept
}

}  // namespace torchtune_fused
