// AdamW: what the host hands to the kernel, and its launches.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cuda_utils.h"

namespace torchtune_fused {

// A parameter with what belongs to it, all [size], at any address.
struct AdamWTensor {
  void* param;
  const void* grad;
  void* exp_avg;
  void* exp_avg_sq;
  const float* step;  // one value on the device: the number of this step, from 1
  int64_t size;
};

struct AdamWParams {
  std::vector<AdamWTensor> tensors;
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  DType dtype;  // of all tensors but the steps
};

void launch_adamw(const AdamWParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
