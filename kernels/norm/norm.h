// RMSNorm: what the host hands to the kernels, and their launches.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

struct RmsNormParams {
  const void* x;       // [rows, dim]
  const void* weight;  // [dim]
  void* y;             // [rows, dim], of the dtype of x
  void* rstd;          // [rows], fp64 if x is, else fp32
  int64_t rows;
  int64_t dim;
  double eps;
  DType dtype;  // of x
  DType weight_dtype;
};

void launch_rms_norm(const RmsNormParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
