// Cross-entropy: what the host hands to the kernels, and their launches.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

struct CrossEntropyParams {
  void* logits;            // [rows, vocab], `stride` elements from row to row
  const int64_t* targets;  // [rows]
  const void* grad;        // [rows], upstream, of the dtype of losses; null stands for ones
  void* losses;            // [rows], fp64 if the logits are, else fp32
  int64_t rows;
  int64_t stride;  // rows start at multiples of 16 bytes
  int64_t vocab;
  int64_t ignore_index;
  double softcap;  // 0: none
  double z_loss;
  bool backward;  // write the gradient over the logits
  DType dtype;    // of logits
};

void launch_cross_entropy(const CrossEntropyParams& params, cudaStream_t stream);

struct ScaleParams {
  void* x;             // [n], starts at a multiple of 16 bytes
  const void* factor;  // one value on the device, fp64 if x is, else fp32
  int64_t n;
  DType dtype;  // of x
};

void launch_scale(const ScaleParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
