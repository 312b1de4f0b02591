// RMSNorm of the tokens by a kernel of its own, where a block of stream_linear can't keep them all.
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "decode/decode.h"

namespace torchtune_fused {
namespace {

constexpr int kNormThreads = 256;

// Grid: one block per token. Block: kNormThreads threads that stride over it in 16-byte pieces.
template <typename T>
__global__ void __launch_bounds__(kNormThreads)
    normalize_tokens_kernel(const __grid_constant__ TokensParams p) {
  launch_dependents();
  wait_for_grid();
  const int64_t start = static_cast<int64_t>(blockIdx.x) * p.k;
  const uint4* x = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + start);
  uint4* out = reinterpret_cast<uint4*>(static_cast<T*>(p.scratch) + start);
  const uint4* weight = static_cast<const uint4*>(p.norm_weight);

  float sum = 0.f;
  for (int i = threadIdx.x; i < p.k / 8; i += kNormThreads) sum += sum_of_squares<T>(x[i]);
  sum = warp_sum(sum);
  __shared__ float partial[kNormThreads / 32];
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int warp = 0; warp < kNormThreads / 32; ++warp) sum += partial[warp];

  const float scale = rsqrtf(sum / p.k + p.eps);
  for (int i = threadIdx.x; i < p.k / 8; i += kNormThreads) {
    out[i] = scale_by<T>(x[i], scale, weight[i]);
  }
}

}  // namespace

void launch_normalize_tokens(const TokensParams& p, cudaStream_t stream) {
  const auto kernel = p.dtype == DType::kFloat16 ? normalize_tokens_kernel<__half>
                                                 : normalize_tokens_kernel<__nv_bfloat16>;
  allow_shared_memory(kernel, 0);
  launch_chained(kernel, p.tokens, kNormThreads, 0, stream, p);
}

}  // namespace torchtune_fused
