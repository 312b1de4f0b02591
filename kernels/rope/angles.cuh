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

// The i-th angle. A position that the tables don't have turns its token to NaN.
template <typename Acc>
__device__ __forceinline__ void load_angle(const RopeParams& p, int64_t position, int i, Acc& cos,
                                           Acc& sin) {
  if (position < 0 || position >= p.max_len) {
    cos = sin = static_cast<Acc>(NAN);
    return;
  }
  cos = load_element<Acc>(p.cos, position * p.cos_stride[0] + i * p.cos_stride[1], p.table_dtype);
  sin = load_element<Acc>(p.sin, position * p.sin_stride[0] + i * p.sin_stride[1], p.table_dtype);
}

// Turns the pair (a, b) by the opposite angle.
__device__ __forceinline__ void turn_pair_back(float& a, float& b, float cos, float sin) {
  const float turned = a * cos + b * sin;
  b = b * cos - a * sin;
  a = turned;
}

}  // namespace torchtune_fused
