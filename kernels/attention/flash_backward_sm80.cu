// The passes of the backward: the queries' statistics, then the gradients, then dQ in its own type.
#include "attention/flash_backward.h"
#include "attention/flash_tiles.cuh"

namespace torchtune_fused {

template <int D>
struct FlashBackwardSm80 {
  static void launch(const FlashAttentionBackwardParams& params,
                     const FlashBackwardWorkspace& workspace, cudaStream_t stream);
};

namespace {

constexpr int kThreads = 256;  // of a block of the passes before and after
constexpr int kRowLanes = 16;  // of the pass before, that share a query

// Grid: queries, heads, batch. kRowLanes lanes per query, padding included: delta = sum(grad_out *
// out), and zeros for the sums of dQ.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    row_stats_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                     const __grid_constant__ FlashBackwardWorkspace workspace) {
  const FlashAttentionParams& p = params.forward;
  const int64_t head = blockIdx.y, batch = blockIdx.z;
  const int lane = threadIdx.x % kRowLanes;
  const int query = (blockIdx.x * kThreads + threadIdx.x) / kRowLanes;
  RowStats stats = {0.f, 0.f};
  if (query < p.queries) {
    const T* out = static_cast<const T*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] +
                   query * p.out_stride[2];
    const T* grad = static_cast<const T*>(params.grad_out) + batch * params.grad_out_stride[0] +
                    head * params.grad_out_stride[1] + query * params.grad_out_stride[2];
    for (int column = lane * 8; column < p.head_dim; column += 8 * kRowLanes) {
      const uint4 o = *reinterpret_cast<const uint4*>(out + column);
      const uint4 g = *reinterpret_cast<const uint4*>(grad + column);
      stats.delta += dot<T>(o, g);
    }
    stats.lse = p.lse[(batch * p.heads + head) * p.queries + query] * kLog2E;
  }
#pragma unroll
  for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
    stats.delta += __shfl_xor_sync(~0u, stats.delta, offset);
  }
  const int64_t row = (batch * p.heads + head) * workspace.padded_queries + query;
  if (lane == 0) workspace.stats[row] = stats;
  if (params.deterministic) return;
  float4* sums = reinterpret_cast<float4*>(workspace.grad_q + row * workspace.padded_dim);
  for (int i = lane; i < workspace.padded_dim / 4; i += kRowLanes) sums[i] = {0.f, 0.f, 0.f, 0.f};
}

// Grid: queries, heads, batch. The fp32 sums of dQ, times the scale: a thread takes 8 columns of
// two rows of an mma, four threads side by side 32 columns.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    convert_grad_q_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                          const __grid_constant__ FlashBackwardWorkspace workspace) {
  const FlashAttentionParams& p = params.forward;
  const int64_t head = blockIdx.y, batch = blockIdx.z;
  const unsigned thread = blockIdx.x * kThreads + threadIdx.x, part = thread / 32;
  const unsigned parts = workspace.padded_dim / 32;
  const int column = (part % parts * 4 + thread % 4) * 8, row = thread / 4 % 8;
  const int query = part / parts * 16 + row;
  if (query >= p.queries || column >= p.head_dim) return;
  const float* sums =
      workspace.grad_q + (((batch * p.heads + head) * workspace.padded_queries + query - row) *
                              workspace.padded_dim +
                          column * 16);
  float rows[2][8];
  read_fragment_rows(rows, sums, row);
  T* target = static_cast<T*>(params.grad_q) + batch * params.grad_q_stride[0] +
              head * params.grad_q_stride[1] + query * params.grad_q_stride[2] + column;
  const float scale = static_cast<float>(p.scale);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (query + 8 * j >= p.queries) continue;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = pack<T>(rows[j][2 * i] * scale, rows[j][2 * i + 1] * scale);
    }
    *reinterpret_cast<uint4*>(target + 8 * j * params.grad_q_stride[2]) = {words[0], words[1],
                                                                           words[2], words[3]};
  }
}

// Of the passes before and after, with so many threads per head.
dim3 grid_for(const FlashAttentionParams& p, int64_t threads) {
  return dim3(static_cast<unsigned>((threads + kThreads - 1) / kThreads), p.heads, p.batch);
}

}  // namespace

int64_t flash_backward_workspace_sm80(const FlashAttentionBackwardParams& p) {
  const FlashBackwardWorkspace workspace(p, nullptr);
  return workspace.rows(p) * static_cast<int64_t>(sizeof(RowStats)) + workspace.grad_q_bytes(p);
}

void launch_flash_backward_sm80(const FlashAttentionBackwardParams& p, void* memory,
                                cudaStream_t stream) {
  const int d = p.forward.head_dim;
  TTF_CHECK(d > 0 && d <= 256 && d % 8 == 0,
            "the head dimension must be a multiple of 8 up to 256, got ", d);
  TTF_CHECK(p.forward.length == nullptr, "the backward takes no length");
  TTF_CHECK(p.forward.batch > 0 && p.forward.queries > 0 && p.forward.keys > 0,
            "the backward needs at least one query and one key, got ", p.forward.batch,
            " batches of ", p.forward.queries, " queries and ", p.forward.keys, " keys");
  const FlashBackwardWorkspace workspace(p, memory);
  const bool half = p.forward.dtype == DType::kFloat16;

  const auto row_stats = half ? row_stats_kernel<__half> : row_stats_kernel<__nv_bfloat16>;
  row_stats<<<grid_for(p.forward, int64_t{kRowLanes} * workspace.padded_queries), kThreads, 0,
              stream>>>(p, workspace);
  TTF_CUDA_CHECK(cudaGetLastError());
  switch (workspace.padded_dim) {
    case 64:
      FlashBackwardSm80<64>::launch(p, workspace, stream);
      break;
    case 96:
      FlashBackwardSm80<96>::launch(p, workspace, stream);
      break;
    case 128:
      FlashBackwardSm80<128>::launch(p, workspace, stream);
      break;
    default:
      FlashBackwardSm80<256>::launch(p, workspace, stream);
  }
  if (!p.deterministic) {
    const auto convert =
        half ? convert_grad_q_kernel<__half> : convert_grad_q_kernel<__nv_bfloat16>;
    const int64_t threads = int64_t{workspace.padded_queries} * workspace.padded_dim / 16;
    convert<<<grid_for(p.forward, threads), kThreads, 0, stream>>>(p, workspace);
    TTF_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace torchtune_fused
