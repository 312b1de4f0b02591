// RMSNorm over each head of q and k (Qwen3, and torchtune's q_norm and k_norm), with the rotation.
//
// Only the families with such norms launch it, after the projection has written the heads as they
// are: a head's norm needs all of its rows, and those come from several tiles, on several SMs.
// Grid: one warp per head of each token. In place, in q and in the cache.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "decode/decode.h"

namespace torchtune_fused {

constexpr int kHeadWarps = 4;
constexpr int kMaxHeadDim = 256;

__device__ __forceinline__ int64_t position_of(const DecodeQkvParams& p, int token) {
  if (p.rope.input_pos == nullptr) return p.cache_pos[0] + token % p.steps;
  return p.rope.input_pos[p.rope.input_pos_batched ? token : token % p.steps];
}

// Where a head of a token is stored: matrix 0: q, 1: the key cache, 2: the value cache. Null if
// the cache has no such slot, so that a full cache is never written past its end.
template <typename T>
__device__ __forceinline__ T* head_pointer(const DecodeQkvParams& p, int matrix, int head, int token,
                                           int64_t slot) {
  if (matrix == 0) {
    return static_cast<T*>(p.q) + (static_cast<int64_t>(token) * p.heads + head) * p.head_dim;
  }
  if (slot < 0 || slot >= p.max_len) return nullptr;
  const int64_t row = (static_cast<int64_t>(token / p.steps) * p.kv_heads + head) * p.max_len + slot;
  return static_cast<T*>(matrix == 1 ? p.k_cache : p.v_cache) + row * p.head_dim;
}

template <typename T>
__global__ void __launch_bounds__(32 * kHeadWarps)
    head_norm_kernel(const __grid_constant__ DecodeQkvParams p) {
  wait_for_grid();
  launch_dependents();
  const int lane = threadIdx.x % 32;
  const int index = blockIdx.x * kHeadWarps + threadIdx.x / 32;
  const int heads = p.heads + p.kv_heads;
  if (index >= p.in.tokens * heads) return;
  const int token = index / heads, matrix = index % heads < p.heads ? 0 : 1;
  const int head = index % heads - matrix * p.heads;
  T* values = head_pointer<T>(p, matrix, head, token, p.cache_pos[0] + token % p.steps);
  if (values == nullptr) return;
  const T* weight = static_cast<const T*>(matrix == 0 ? p.q_norm : p.k_norm);

  constexpr int kPairsPerLane = kMaxHeadDim / 64;
  const int half = p.head_dim / 2;
  const auto first_of = [&](int i) { return p.rope.interleaved ? 2 * i : i; };
  const int distance = p.rope.interleaved ? 1 : half;
  float a[kPairsPerLane], b[kPairsPerLane], sum = 0.f;
#pragma unroll
  for (int j = 0; j < kPairsPerLane; ++j) {
    const int i = lane + 32 * j;
    a[j] = i < half ? static_cast<float>(values[first_of(i)]) : 0.f;
    b[j] = i < half ? static_cast<float>(values[first_of(i) + distance]) : 0.f;
    sum += a[j] * a[j] + b[j] * b[j];
  }
  const float scale = rsqrtf(warp_sum(sum) / p.head_dim + p.head_eps);  // turning keeps the norm
  const int64_t position = p.rope.cos ? position_of(p, token) : 0;
#pragma unroll
  for (int j = 0; j < kPairsPerLane; ++j) {
    const int i = lane + 32 * j;
    if (i >= half) continue;
    const float weight_a = static_cast<float>(weight[first_of(i)]) * scale;
    const float weight_b = static_cast<float>(weight[first_of(i) + distance]) * scale;
    float cos = 1.f, sin = 0.f;
    if (p.rope.cos) {
      cos = p.rope.cos[position * p.rope.cos_stride[0] + i * p.rope.cos_stride[1]];
      sin = p.rope.sin[position * p.rope.sin_stride[0] + i * p.rope.sin_stride[1]];
    }
    if (p.norm_before_rope) {
      a[j] *= weight_a;
      b[j] *= weight_b;
    }
    float turned_a = a[j] * cos - b[j] * sin, turned_b = b[j] * cos + a[j] * sin;
    if (!p.norm_before_rope) {
      turned_a *= weight_a;
      turned_b *= weight_b;
    }
    values[first_of(i)] = T(turned_a);
    values[first_of(i) + distance] = T(turned_b);
  }
}

}  // namespace torchtune_fused
