// Rotary position embeddings of heads that are still sums in registers; see rope/rope.cuh.
//
// Of each of its two rows, a thread holds columns 8 j + 2 (t % 4) + {0, 1} of a tile of 256
// (wgmma.cuh): both channels of a pair, be they neighbours or half a head apart, if heads of 64 or
// 128 channels fill the tile. All heads of a row have their angles in common.
//
// Tables, in fp32, as torchtune keeps them: of a position, cosine and sine of a pair side by side
// if channels are neighbours, else the cosines of all pairs, and the sines.
#pragma once

#include <cmath>

#include "rope/angles.cuh"

namespace torchtune_fused {

// The angles of a thread's rows, for as many pairs as 64 channels have in it.
struct Angles {
  static constexpr int kPairs = 8;
  int position[2];           // -1: the tables don't have it
  float2 values[2][kPairs];  // of neighbours (cos, sin); else two cosines each, then two sines each

  // `row` is the first one of the warpgroup.
  __device__ __forceinline__ void locate(const RopeParams& rope, int row) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * i;
      const int token = min(own, static_cast<int>(rope.tokens) - 1);
      const int64_t at = position_of(rope, token / rope.steps, token % rope.steps);
      position[i] = at >= 0 && at < rope.max_len ? static_cast<int>(at) : -1;
    }
  }

  // Those of the chunk-th 64 channels of a head, if pairs are neighbours; else of the chunk-th 32
  // and of those half a head further on.
  __device__ __forceinline__ void load(const RopeParams& rope, int chunk) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = max(position[i], 0) * rope.cos_stride[0] + threadIdx.x % 4 * 2;
      const float* first = static_cast<const float*>(rope.cos) + row;
      const float* second = static_cast<const float*>(rope.sin) + row;
      if (rope.interleaved) {
        first += 64 * chunk;
        second = first + 32;
      } else {
        first += 32 * chunk;
        second += 32 * chunk;
      }
#pragma unroll
      for (int j = 0; j < kPairs / 2; ++j) {
        values[i][j] = *reinterpret_cast<const float2*>(first + 8 * j);
        values[i][j + kPairs / 2] = *reinterpret_cast<const float2*>(second + 8 * j);
      }
    }
  }

  template <bool kInterleaved>
  __device__ __forceinline__ float2 pair(int i, int j) const {
    const float2 low = values[i][kInterleaved ? j : j / 2];
    if (kInterleaved) return low;
    const float2 high = values[i][kPairs / 2 + j / 2];
    return j % 2 ? make_float2(low.y, high.y) : make_float2(low.x, high.x);
  }
};

// `angles` holds those of chunk 0.
template <int kHeadDim, bool kInterleaved>
__device__ __forceinline__ void rotate_heads(float (&sum)[128], const RopeParams& rope,
                                             Angles& angles) {
#pragma unroll
  for (int chunk = 0; chunk < kHeadDim / 64; ++chunk) {
    if (chunk > 0) angles.load(rope, chunk);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < Angles::kPairs; ++j) {
        const float2 angle = angles.pair<kInterleaved>(i, j);
        const float cos = angles.position[i] < 0 ? NAN : angle.x, sin = angle.y;
#pragma unroll
        for (int head = 0; head < 256 / kHeadDim; ++head) {
          const int first = head * kHeadDim / 2 + 2 * i +
                            (kInterleaved ? 4 * (8 * chunk + j) : 4 * (4 * chunk + j / 2) + j % 2);
          float& a = sum[first];
          float& b = sum[first + (kInterleaved ? 1 : kHeadDim / 4)];
          const float turned = a * cos - b * sin;
          b = b * cos + a * sin;
          a = turned;
        }
      }
    }
  }
}

template <int kHeadDim>
__device__ __forceinline__ void rotate_heads(float (&sum)[128], const RopeParams& rope,
                                             Angles& angles) {
  if (rope.interleaved) {
    rotate_heads<kHeadDim, true>(sum, rope, angles);
  } else {
    rotate_heads<kHeadDim, false>(sum, rope, angles);
  }
}

__device__ __forceinline__ void rotate_heads(float (&sum)[128], const RopeParams& rope,
                                             Angles& angles) {
  if (rope.head_dim == 64) {
    rotate_heads<64>(sum, rope, angles);
  } else {
    rotate_heads<128>(sum, rope, angles);
  }
}

}  // namespace torchtune_fused
