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
  double weight_offset;  // 1 for Gemma's (1 + weight), else 0
  DType dtype;           // of x
  DType weight_dtype;
};

struct RmsNormBackwardParams {
  const void* grad;    // [rows, dim], of the dtype of x
  const void* x;       // [rows, dim]
  const void* weight;  // [dim]
  const void* rstd;    // [rows]
  void* grad_x;        // [rows, dim]
  void* partial;       // [blocks, dim], of the dtype of rstd: sums over the rows of each block
  int64_t rows;
  int64_t dim;
  double weight_offset;
  DType dtype;
  DType weight_dtype;
};

void launch_rms_norm(const RmsNormParams& params, cudaStream_t stream);

// The blocks, and so the rows of `partial`, that the backward pass takes.
int rms_norm_backward_blocks(const RmsNormBackwardParams& params);
void launch_rms_norm_backward(const RmsNormBackwardParams& params, int blocks, cudaStream_t stream);

}  // namespace torchtune_fused
