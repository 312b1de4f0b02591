// How splits that are no cluster hand each other their results: through global memory, where each
// block then merges a share of the columns.
//
// The blocks of a row tile wait for one another. They are neighbours in the grid, and no more than
// the GPU has SMs: where the last ones find no room yet, other tiles' blocks have it, and leave.
#pragma once

#include "attention/attention.h"

namespace torchtune_fused {

constexpr int kRows = 16;  // query rows in a tile

// Four columns of a row's sum of values, weighted by exp2(logit - maximum), and the sum of weights.
struct Partial {
  float maximum = -INFINITY, weight = 0.f;
  float4 out = {0.f, 0.f, 0.f, 0.f};

  __device__ __forceinline__ float2 stat() const { return {maximum, weight}; }

  __device__ __forceinline__ void add(float2 stat, float4 part) {
    const float new_maximum = fmaxf(maximum, stat.x);
    const float base = new_maximum == -INFINITY ? 0.f : new_maximum;  // -inf - -inf is no number
    const float decay = exp2f(maximum - base), factor = exp2f(stat.x - base);
    maximum = new_maximum;
    weight = weight * decay + stat.y * factor;
    out = {out.x * decay + part.x * factor, out.y * decay + part.y * factor,
           out.z * decay + part.z * factor, out.w * decay + part.w * factor};
  }
};

template <int D>
struct Exchange {
  float2* stats;  // [split][row]
  float* outs;    // [split][row][D]
  unsigned* arrivals;

  __device__ Exchange(const DecodeAttentionParams& p, int64_t tile)
      : stats(p.partial_stat + tile * p.splits * kRows),
        outs(p.partial_out + tile * p.splits * kRows * D),
        arrivals(p.arrivals + tile) {}

  __device__ __forceinline__ void send(int split, int row, int column, const Partial& own) const {
    const int at = split * kRows + row;
    *reinterpret_cast<float4*>(outs + at * D + column) = own.out;
    if (column == 0) stats[at] = own.stat();
  }

  // By all threads of a block that has sent what it has. Counts those who come, then those who have
  // seen that all are there, of whom the last leaves zero.
  __device__ __forceinline__ void meet(unsigned active) const {
    __syncthreads();
    if (threadIdx.x == 0) {
      const unsigned wrap = 2 * active - 1;
      asm volatile("red.release.gpu.global.inc.u32 [%0], %1;"
                   ::"l"(arrivals), "r"(wrap) : "memory");
      unsigned there;
      do {
        asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(there) : "l"(arrivals) : "memory");
      } while (there < active);
      asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;"
                   ::"l"(arrivals), "r"(wrap) : "memory");
    }
    __syncthreads();
  }

  // Calls use(row, column, all) for the pieces of four columns from `begin` to `end`. As many lanes
  // as there are to spare merge a piece: each the splits that are its own, then they theirs.
  template <typename F>
  __device__ __forceinline__ void for_merged(int begin, int end, int active, F use) const {
    const int threads = blockDim.x;
    int lanes = 16;
    while (lanes > 1 && (lanes >= 2 * active || (end - begin) * lanes > threads)) lanes /= 2;
    const int lane = threadIdx.x % lanes;
    for (int first = begin; first < end; first += threads / lanes) {
      const int i = first + threadIdx.x / lanes, row = i / (D / 4), column = i % (D / 4) * 4;
      Partial all;
#pragma unroll 4
      for (int split = i < end ? lane : active; split < active; split += lanes) {
        const int at = split * kRows + row;
        // From L2: this SM's L1 may still hold what an earlier launch left here.
        const float2 stat = __ldcg(stats + at);
        all.add(stat, __ldcg(reinterpret_cast<const float4*>(outs + at * D + column)));
      }
      for (int offset = lanes / 2; offset > 0; offset /= 2) {
        const auto others = [&](float x) { return __shfl_xor_sync(~0u, x, offset); };
        const float2 stat = {others(all.maximum), others(all.weight)};
        all.add(stat, {others(all.out.x), others(all.out.y), others(all.out.z), others(all.out.w)});
      }
      if (lane == 0 && i < end) use(row, column, all);
    }
  }
};

}  // namespace torchtune_fused
