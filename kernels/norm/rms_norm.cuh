// RMSNorm (Zhang and Sennrich, 2019): out = x / sqrt(mean(x^2) + eps) * weight, in fp32.
//
// Grid: one block per row. Block: kThreads threads that stride over the row.
// Memory: x and out [rows, dim] and weight [dim], row-major; the row is read twice, the second
// time from the L1 cache.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "norm/norm.h"

namespace torchtune_fused {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormParams p) {
  const T* x = static_cast<const T*>(p.x) + blockIdx.x * p.dim;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + blockIdx.x * p.dim;

  float sum = 0.f;
  for (int64_t i = threadIdx.x; i < p.dim; i += kThreads) {
    const float value = static_cast<float>(x[i]);
    sum += value * value;
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  __shared__ float partial[kThreads / 32];
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.f;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += partial[warp];

  const float scale = rsqrtf(sum / p.dim + p.eps);
  for (int64_t i = threadIdx.x; i < p.dim; i += kThreads) {
    out[i] = T(static_cast<float>(x[i]) * scale * static_cast<float>(weight[i]));
  }
}

}  // namespace torchtune_fused
