// RMSNorm (Zhang and Sennrich, 2019): y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps).
//
// Grid: one block per row. Block: kThreads threads that stride over the row.
// Memory: x and y [rows, dim], weight [dim], rstd [rows], all contiguous; the second read of the
// row comes from the L1 cache.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "norm/norm.h"

namespace torchtune_fused {

constexpr int kThreads = 256;

// T: element of x. W: element of weight. The arithmetic is fp32, for fp64 input fp64.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormParams p) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.dim;
  const W* weight = static_cast<const W*>(p.weight);
  T* y = static_cast<T*>(p.y) + row * p.dim;

  Acc sum = 0;
  for (int64_t i = threadIdx.x; i < p.dim; i += kThreads) {
    const Acc value = static_cast<Acc>(x[i]);
    sum += value * value;
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  __shared__ Acc partial[kThreads / 32];
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) sum += partial[warp];

  const Acc rstd = rsqrt(sum / static_cast<Acc>(p.dim) + static_cast<Acc>(p.eps));
  if (threadIdx.x == 0) static_cast<Acc*>(p.rstd)[row] = rstd;
  for (int64_t i = threadIdx.x; i < p.dim; i += kThreads) {
    y[i] = static_cast<T>(static_cast<Acc>(x[i]) * rstd * static_cast<Acc>(weight[i]));
  }
}

}  // namespace torchtune_fused
