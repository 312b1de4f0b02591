// The passes around the backward kernels: statistics of the queries before, and dQ in its own type
// after, turned back together with dK if queries and keys are rotations.
#pragma once

#include "attention/flash_backward.h"
#include "attention/flash_tiles.cuh"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "rope/angles.cuh"

namespace torchtune_fused {

constexpr int kPassThreads = 256;

// ---- Before: a block for kBackwardRows queries of a head ----------------------------------------

// delta = sum(grad_out * out) by kLanes lanes a query, padding included, and zeros for the sums of
// dQ, which are written while the loads are under way. Heads come first, since in memory they
// mostly lie side by side.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kPassThreads, 4)
    row_stats_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                     const __grid_constant__ FlashBackwardWorkspace workspace) {
  launch_dependents();
  wait_for_grid();
  constexpr int kStep = kPassThreads / kLanes, kBatch = 4;  // queries, and loads, at a time
  const FlashAttentionParams& p = params.forward;
  const int blocks = workspace.padded_queries / kBackwardRows;  // of a head
  const int head = blockIdx.x % p.heads, batch = blockIdx.x / p.heads / blocks;
  const int first = blockIdx.x / p.heads % blocks * kBackwardRows;
  const int64_t row = (int64_t{batch} * p.heads + head) * workspace.padded_queries + first;

  const int lane = threadIdx.x % kLanes, column = lane * 8;
  const T* out =
      static_cast<const T*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] + column;
  const T* grad = static_cast<const T*>(params.grad_out) + batch * params.grad_out_stride[0] +
                  head * params.grad_out_stride[1] + column;
  const float* lse = p.lse + (int64_t{batch} * p.heads + head) * p.queries;
#pragma unroll 1
  for (int i = threadIdx.x / kLanes; i < kBackwardRows; i += kBatch * kStep) {
    uint4 o[kBatch] = {}, g[kBatch] = {};
    float l[kBatch] = {};
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int query = first + i + j * kStep;
      if (query >= p.queries || column >= p.head_dim) continue;
      o[j] = *reinterpret_cast<const uint4*>(out + query * p.out_stride[2]);
      g[j] = *reinterpret_cast<const uint4*>(grad + query * params.grad_out_stride[2]);
      if (lane == 0) l[j] = lse[query];
    }
    if (i < kStep && !params.deterministic) {
      float4* sums = reinterpret_cast<float4*>(workspace.grad_q + row * workspace.padded_dim);
      const int count = kBackwardRows * workspace.padded_dim / 4;
#pragma unroll 4
      for (int at = threadIdx.x; at < count; at += kPassThreads) sums[at] = {0.f, 0.f, 0.f, 0.f};
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      float delta = dot<T>(o[j], g[j]);
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        delta += __shfl_xor_sync(~0u, delta, offset);
      }
      if (lane == 0) workspace.stats[row + i + j * kStep] = {l[j] * kLog2E, delta};
    }
  }
}

// ---- After: a block for 16 tokens of some heads, a warp for each --------------------------------

constexpr int kConvertRows = 16, kConvertHeads = kPassThreads / 32;

// Cosines and sines of a block's tokens. Rows are padded so that reading them takes all banks.
struct TokenAngles {
  alignas(16) float2 of[kConvertRows][256 / 2 + 2];
};

__device__ __forceinline__ void stage_angles(const RopeParams& rope, int batch, int first,
                                             TokenAngles& angles) {
  const int pairs = rope.head_dim / 2;
  for (int i = threadIdx.x; i < kConvertRows * pairs; i += kPassThreads) {
    const int row = i / pairs, pair = i % pairs;
    if (first + row >= rope.steps) break;
    float2& angle = angles.of[row][pair];
    load_angle(rope, position_of(rope, batch, first + row), pair, angle.x, angle.y);
  }
  __syncthreads();
}

// A gradient of one token and head: 8 columns, `low`, and those half a head further on.
struct GradColumns {
  float low[8], high[8];

  __device__ __forceinline__ void turn_back(bool interleaved, const float2* angles, int column,
                                            int half) {
    const float2* first = angles + (interleaved ? column / 2 : column);
    const float2* second = interleaved ? angles + (column + half) / 2 : first + 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 two = reinterpret_cast<const float4*>(j < 2 ? first : second)[j % 2];
      if (interleaved) {
        float* pairs = (j < 2 ? low : high) + j % 2 * 4;
        turn_pair_back(pairs[0], pairs[1], two.x, two.y);
        turn_pair_back(pairs[2], pairs[3], two.z, two.w);
      } else {
        turn_pair_back(low[2 * j], high[2 * j], two.x, two.y);
        turn_pair_back(low[2 * j + 1], high[2 * j + 1], two.z, two.w);
      }
    }
  }

  __device__ __forceinline__ void scale_by(float factor) {
#pragma unroll
    for (int j = 0; j < 8; ++j) low[j] *= factor, high[j] *= factor;
  }

  template <typename T>
  __device__ __forceinline__ void read(const T* from, int half) {
    unpack_vec<T>(*reinterpret_cast<const uint4*>(from), low);
    unpack_vec<T>(*reinterpret_cast<const uint4*>(from + half), high);
  }

  template <typename T>
  __device__ __forceinline__ void write(T* to, int half, bool write_high) const {
    *reinterpret_cast<uint4*>(to) = pack_vec<T>(low);
    if (write_high) *reinterpret_cast<uint4*>(to + half) = pack_vec<T>(high);
  }
};

// Whether the pass can turn a head: its vectors must not straddle the halves.
inline bool turns_vectors(const FlashAttentionBackwardParams& p) {
  return p.rope.cos != nullptr && p.forward.head_dim % 16 == 0;
}

// dQ from its fp32 sums, times the scale. If it `turns`, dQ and dK become the gradients of what
// queries and keys were before their rotation.
template <typename T>
__global__ void __launch_bounds__(kPassThreads, 3)
    convert_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                   const __grid_constant__ FlashBackwardWorkspace workspace, bool turns) {
  launch_dependents();
  wait_for_grid();
  __shared__ TokenAngles angles;
  const FlashAttentionParams& p = params.forward;
  const int heads = p.heads + (turns ? p.kv_heads : 0);
  const int groups = (heads + kConvertHeads - 1) / kConvertHeads;
  const int tiles = workspace.padded_queries / kConvertRows;
  const int batch = blockIdx.x / groups / tiles;
  const int first = blockIdx.x / groups % tiles * kConvertRows;
  if (turns) stage_angles(params.rope, batch, first, angles);

  const int lane = threadIdx.x % 32;
  const int head = blockIdx.x % groups * kConvertHeads + threadIdx.x / 32;
  if (head >= heads) return;
  const bool of_q = head < p.heads;
  const int64_t(&stride)[3] = of_q ? params.grad_q_stride : params.grad_k_stride;
  T* grad = static_cast<T*>(of_q ? params.grad_q : params.grad_k) + batch * stride[0] +
            (of_q ? head : head - p.heads) * stride[1];
  const int64_t row = (int64_t{batch} * p.heads + head) * workspace.padded_queries + first;
  const float* sums = workspace.grad_q + row * workspace.padded_dim;
  const int half = (p.head_dim / 2 + 7) / 8 * 8;
  const float scale = static_cast<float>(p.scale);
  for (int column = lane % 4 * 8; column < half; column += 32) {
    GradColumns grads[2];
    if (of_q) {
      read_fragment_rows(grads[0].low, grads[1].low, sums + column * 16, lane / 4);
      read_fragment_rows(grads[0].high, grads[1].high, sums + (column + half) * 16, lane / 4);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = lane / 4 + 8 * j;
      if (first + row >= p.queries) continue;
      T* to = grad + (first + row) * stride[2] + column;
      if (!of_q) grads[j].read(to, half);
      if (turns) grads[j].turn_back(params.rope.interleaved, angles.of[row], column, half);
      if (of_q) grads[j].scale_by(scale);
      grads[j].write(to, half, column + half < p.head_dim);
    }
  }
}

}  // namespace torchtune_fused
