// RMSNorm, alone or of a sum: what the host hands to the kernels, and their launches.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

struct RmsNormParams {
  const void* x;         // [rows, dim]
  const void* residual;  // [rows, dim], or null: what to add to x before
  const void* weight;    // [dim]
  void* y;               // [rows, dim], of the dtype of x
  void* sum;             // [rows, dim], or null with residual: x + residual
  void* rstd;            // [rows], fp64 if x is, else fp32
  int64_t rows;
  int64_t dim;
  double eps;
  double weight_offset;  // 1 for Gemma's (1 + weight), else 0
  DType dtype;           // of x
  DType weight_dtype;
};

struct RmsNormBackwardParams {
  const void* grad;       // [rows, dim], of the dtype of x
  const void* x;          // [rows, dim]
  const void* weight;     // [dim]
  const void* rstd;       // [rows]
  const void* grad_skip;  // [rows, dim], or null: what to add to the gradient of x
  void* grad_x;           // [rows, dim]
  void* partial;  // [blocks, dim], of the dtype of rstd: sums over the rows of each block; or null
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
