// Heads normalised and rotated: what the host hands to the kernels, and their launches.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

// The queries, the keys or the values of all tokens. Strides are in elements; the last dimension is
// dense.
struct RopeHeads {
  const void* x;      // [b, s, heads, d]
  int64_t stride[3];  // of b, s and heads
  const void* grad;   // the gradient of the output, as x; backward with a norm only
  int64_t grad_stride[3];
  void* out;         // the output, or the gradient of x
  int64_t out_stride[3];
  bool cached;       // whether out is a cache, in which the tokens go behind those that it holds
  bool as_they_are;  // neither normalised nor rotated: values
  const void* norm;  // [d], the scale of the norm; null: none
  DType norm_dtype;
  void* partial;  // [blocks, d]: sums of the norm's gradient, fp64 if x is, else fp32
  int heads;
  int blocks;  // how many blocks of the grid work on them
};

struct RopeParams {
  RopeHeads of[3];  // queries, keys and values; the backward pass knows no values
  const void* cos;  // [max_len, d / 2]
  const void* sin;
  int64_t cos_stride[2];
  int64_t sin_stride[2];
  int64_t max_len;
  const void* input_pos;  // [tokens], or [steps] for all rows of the batch; null: 0, 1, ...
  bool input_pos_int32;
  bool input_pos_batched;
  bool interleaved;  // pairs (2i, 2i + 1), else (i, i + d / 2)
  bool inverse;      // rotate by the opposite angle
  bool norm_before_rope;
  int64_t tokens;  // b * s
  int steps;       // s
  int head_dim;
  int lane_bits;       // a head takes 1 << lane_bits lanes of a warp
  int heads_per_warp;  // of a token
  double eps;
  int64_t* cache_pos;  // [cache_len], counting up from the first free slot of the cache
  int64_t cache_len;
  DType dtype;        // of the heads
  DType table_dtype;  // of cos and sin
};

constexpr int kRopeMaxHeadDim = 512;

// Set how the work is divided: lanes, and the blocks of all heads, and so the rows of `partial`.
void plan_rope(RopeParams& params);
void plan_rope_backward(RopeParams& params);

void launch_rope(const RopeParams& params, cudaStream_t stream);  // moves cache_pos on, too
void launch_rope_backward(const RopeParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
