// Parts of attention: which split reads what, and how what they leave is merged.
#pragma once

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "decode/decode.h"

namespace torchtune_fused {

constexpr int kUnitKeys = 16;     // keys that a warp takes at once
constexpr int kSplitsAtOnce = 4;  // whose loads are under way together while they are merged
constexpr int kFewKeys = 768;

// Slots filled. Never more than there are, whatever the device says.
__device__ __forceinline__ int filled_slots(const AttentionParts& parts) {
  const long long length = __ldcg(reinterpret_cast<const long long*>(parts.length));
  return static_cast<int>(min(max(length, 0ll), static_cast<long long>(parts.max_len)));
}

__device__ __forceinline__ int units_of(int length) { return (length + kUnitKeys - 1) / kUnitKeys; }

// How many splits have work: no more than the projection reads at once, while those are enough.
__device__ __forceinline__ int active_splits(int length) {
  return max(min(units_of(length), length <= kFewKeys ? kSplitsAtOnce : kMaxSplits), 1);
}

// Eight columns of the attention of a head, merged from the active splits, in their order.
template <typename T>
__device__ __forceinline__ uint4 merge_parts(const AttentionParts& parts, int active, int head,
                                             int column) {
  const int first_row = head / parts.group * kMaxSplits * parts.group + head % parts.group;
  const float2* stats = parts.stats + first_row;
  const float* outs = parts.outs + first_row * kAttendHeadDim + column;
  float maximum = -INFINITY, sum = 0.f, total[8] = {};
#pragma unroll 1
  for (int first = 0; first < active; first += kSplitsAtOnce) {
    float2 stat[kSplitsAtOnce];
    float4 part[kSplitsAtOnce][2];
#pragma unroll
    for (int i = 0; i < kSplitsAtOnce; ++i) {
      const int row = min(first + i, active - 1) * parts.group;
      const auto* out = reinterpret_cast<const float4*>(outs + row * kAttendHeadDim);
      stat[i] = __ldcg(stats + row);
      part[i][0] = __ldcg(out);
      part[i][1] = __ldcg(out + 1);
    }
#pragma unroll
    for (int i = 0; i < kSplitsAtOnce; ++i) {
      if (first + i >= active || stat[i].x == -INFINITY) continue;
      const float new_maximum = fmaxf(maximum, stat[i].x);
      const float decay = exp2f(maximum - new_maximum), factor = exp2f(stat[i].x - new_maximum);
      maximum = new_maximum;
      sum = sum * decay + stat[i].y * factor;
      const float* values = reinterpret_cast<const float*>(part[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) total[j] = total[j] * decay + values[j] * factor;
    }
  }
  const float scale = sum > 0.f ? 1.f / sum : 0.f;  // a token that sees nothing gives zeros
  return {pack<T>(total[0] * scale, total[1] * scale), pack<T>(total[2] * scale, total[3] * scale),
          pack<T>(total[4] * scale, total[5] * scale), pack<T>(total[6] * scale, total[7] * scale)};
}

}  // namespace torchtune_fused
