// The angles of rotations: where tokens stand, and what the tables hold for them.
#pragma once

#include <cmath>

#include "common/elements.cuh"
#include "rope/rope.h"

namespace torchtune_fused {

__device__ __forceinline__ int64_t position_of(const RopeParams& p, int64_t batch, int64_t step) {
  const int64_t index = p.input_pos_batched ? batch * p.steps + step : step;
  if (p.input_pos == nullptr) return step;
  return p.input_pos_int32 ? static_cast<const int32_t*>(p.input_pos)[index]
                           : static_cast<const int64_t*>(p.input_pos)[index];
}

// Several angles of a position. One that the tables don't have turns its token to NaN.
template <int kCount, typename Acc>
__device__ __forceinline__ void load_angles(const RopeParams& p, int64_t position,
                                            const int (&angle)[kCount], Acc (&cos)[kCount],
                                            Acc (&sin)[kCount]) {
  if (position < 0 || position >= p.max_len) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) cos[n] = sin[n] = static_cast<Acc>(NAN);
    return;
  }
  int64_t cos_at[kCount], sin_at[kCount];
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    cos_at[n] = position * p.cos_stride[0] + angle[n] * p.cos_stride[1];
    sin_at[n] = position * p.sin_stride[0] + angle[n] * p.sin_stride[1];
  }
  load_elements(p.cos, cos_at, p.table_dtype, cos);
  load_elements(p.sin, sin_at, p.table_dtype, sin);
}

template <typename Acc>
__device__ __forceinline__ void load_angle(const RopeParams& p, int64_t position, int i, Acc& cos,
                                           Acc& sin) {
  Acc c[1], s[1];
  load_angles(p, position, {i}, c, s);
  cos = c[0], sin = s[0];
}

// Turns the pair (a, b) by the opposite angle.
__device__ __forceinline__ void turn_pair_back(float& a, float& b, float cos, float sin) {
  const float turned = a * cos + b * sin;
  b = b * cos - a * sin;
  a = turned;
}

}  // namespace torchtune_fused
