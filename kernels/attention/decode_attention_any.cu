// Attention over a KV cache for what decode_attention.cuh has no instantiation for: fp32 and fp64,
// and unusual head dimensions. Correct, not fast.
//
// Grid: (heads * steps, batch), one query row each. Block: 4 warps; warp w takes keys w, w + 4, ...
// with the head dimension spread over its lanes, and the warps are merged in shared memory.
#include "attention/attention.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/types.cuh"

namespace torchtune_fused {
namespace {

constexpr int kAnyWarps = 4;
constexpr int kMaxHeadDim = 512;
constexpr int kPerLane = kMaxHeadDim / 32;

template <typename T>
__global__ void __launch_bounds__(32 * kAnyWarps)
    decode_attention_any_kernel(const __grid_constant__ DecodeAttentionParams p) {
  using Acc = AccOf<T>;
  __shared__ Acc merged[kAnyWarps][kMaxHeadDim], maxima[kAnyWarps], sums[kAnyWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x / p.steps, step = blockIdx.x % p.steps, batch = blockIdx.y;
  const int kv_head = head / (p.heads / p.kv_heads);
  const int64_t length = *p.length < p.max_len ? *p.length : p.max_len;
  const int64_t own = length - p.steps + step;
  const int64_t last = p.mask ? length : own + 1;
  const int64_t first = p.window && own >= p.window ? own - p.window + 1 : 0;
  const unsigned char* mask = p.mask ? p.mask + batch * p.mask_stride[0] +
                                           head * p.mask_stride[1] + step * p.mask_stride[2]
                                     : nullptr;
  const T* q = static_cast<const T*>(p.q) + batch * p.q_stride[0] + head * p.q_stride[1] +
               step * p.q_stride[2];
  const T* k = static_cast<const T*>(p.k) + batch * p.k_stride[0] + kv_head * p.k_stride[1];
  const T* v = static_cast<const T*>(p.v) + batch * p.v_stride[0] + kv_head * p.v_stride[1];

  Acc out[kPerLane] = {}, maximum = -INFINITY, sum = 0;
  for (int64_t key = first + warp; key < last; key += kAnyWarps) {
    if (mask && !mask[key]) continue;
    Acc logit = 0;
    for (int d = lane; d < p.head_dim; d += 32) {
      logit += static_cast<Acc>(q[d]) * static_cast<Acc>(k[key * p.k_stride[2] + d]);
    }
    for (int offset = 16; offset > 0; offset /= 2) logit += __shfl_xor_sync(~0u, logit, offset);
    logit *= static_cast<Acc>(p.scale);
    const Acc new_maximum = logit > maximum ? logit : maximum;
    const Acc decay = exp(maximum - new_maximum), weight = exp(logit - new_maximum);
    maximum = new_maximum;
    sum = sum * decay + weight;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int d = lane + 32 * i;
      if (d < p.head_dim) {
        out[i] = out[i] * decay + weight * static_cast<Acc>(v[key * p.v_stride[2] + d]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kPerLane; ++i) merged[warp][lane + 32 * i] = out[i];
  if (lane == 0) maxima[warp] = maximum, sums[warp] = sum;
  __syncthreads();
  Acc block_max = -INFINITY, block_sum = 0, factor[kAnyWarps];
  for (int w = 0; w < kAnyWarps; ++w) block_max = maxima[w] > block_max ? maxima[w] : block_max;
  for (int w = 0; w < kAnyWarps; ++w) {
    factor[w] = maxima[w] == -INFINITY ? Acc(0) : exp(maxima[w] - block_max);
    block_sum += sums[w] * factor[w];
  }
  T* target = static_cast<T*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] +
              step * p.out_stride[2];
  for (int d = threadIdx.x; d < p.head_dim; d += 32 * kAnyWarps) {
    Acc total = 0;
    for (int w = 0; w < kAnyWarps; ++w) total += merged[w][d] * factor[w];
    target[d] = static_cast<T>(block_sum > 0 ? total / block_sum : Acc(0));
  }
}

}  // namespace

void launch_decode_attention_any(const DecodeAttentionParams& p, cudaStream_t stream) {
  TTF_CHECK(p.head_dim <= kMaxHeadDim, "attention_decode on CUDA takes head dimensions up to ",
            kMaxHeadDim, ", got ", p.head_dim);
  const auto kernel = p.dtype == DType::kFloat16    ? decode_attention_any_kernel<__half>
                      : p.dtype == DType::kBFloat16 ? decode_attention_any_kernel<__nv_bfloat16>
                      : p.dtype == DType::kFloat32  ? decode_attention_any_kernel<float>
                                                    : decode_attention_any_kernel<double>;
  kernel<<<dim3(p.heads * p.steps, p.batch), 32 * kAnyWarps, 0, stream>>>(p);
  TTF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace torchtune_fused
