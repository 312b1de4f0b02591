// RMSNorm: what the host hands to the kernels, and their launches.
#pragma once

#include "common/cuda_utils.h"

namespace torchtune_fused {

struct RmsNormParams {
  const void* x;       // [rows, dim], contiguous
  const void* weight;  // [dim]
  void* out;           // [rows, dim], contiguous
  int64_t rows;
  int64_t dim;
  float eps;
  DType dtype;
};

void launch_rms_norm(const RmsNormParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
