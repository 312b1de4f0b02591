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

constexpr int kRowWarps = 8;   // of a block of the passes before and after
constexpr int kRowLanes = 16;  // of the pass before, that share a query

// kRowLanes lanes per query, padding included: delta = sum(grad_out * out), and zeros for the sums
// of dQ.
template <typename T>
__global__ void __launch_bounds__(32 * kRowWarps)
    row_stats_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                     const __grid_constant__ FlashBackwardWorkspace workspace) {
  const FlashAttentionParams& p = params.forward;
  const int lane = threadIdx.x % kRowLanes;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kRowLanes;
  const int query = row % workspace.padded_queries;
  const int64_t head = row / workspace.padded_queries % p.heads;
  const int64_t batch = row / workspace.padded_queries / p.heads;
  RowStats stats = {0.f, 0.f};
  if (batch < p.batch && query < p.queries) {
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
  if (batch >= p.batch) return;
  if (lane == 0) workspace.stats[row] = stats;
  if (params.deterministic) return;
  float4* sums = reinterpret_cast<float4*>(workspace.grad_q + row * workspace.padded_dim);
  for (int i = lane; i < workspace.padded_dim / 4; i += kRowLanes) sums[i] = {0.f, 0.f, 0.f, 0.f};
}

// A warp per 16 queries: the fp32 sums of dQ, times the scale.
template <typename T>
__global__ void __launch_bounds__(32 * kRowWarps)
    convert_grad_q_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                          const __grid_constant__ FlashBackwardWorkspace workspace) {
  const FlashAttentionParams& p = params.forward;
  const int lane = threadIdx.x % 32, group_row = lane / 4, quad = lane % 4;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / 32;
  const int tiles = workspace.padded_queries / 16;
  const int64_t head = tile / tiles % p.heads, batch = tile / tiles / p.heads;
  if (batch >= p.batch) return;
  const float* sums = workspace.grad_q + tile * 16 * workspace.padded_dim;
  T* rows = static_cast<T*>(params.grad_q) + batch * params.grad_q_stride[0] +
            head * params.grad_q_stride[1];
  const float scale = static_cast<float>(p.scale);
#pragma unroll 4
  for (int column = 0; column < p.head_dim; column += 8) {
    float d[4];
    read_fragment(d, sums + column * 16, lane);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int query = tile % tiles * 16 + j * 8 + group_row;
      if (query >= p.queries) continue;
      *reinterpret_cast<uint32_t*>(rows + query * params.grad_q_stride[2] + column + quad * 2) =
          pack<T>(d[2 * j] * scale, d[2 * j + 1] * scale);
    }
  }
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + 32 * kRowWarps - 1) / (32 * kRowWarps));
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
  row_stats<<<blocks_for(workspace.rows(p) * kRowLanes), 32 * kRowWarps, 0, stream>>>(p, workspace);
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
    convert<<<blocks_for(workspace.rows(p) * 2), 32 * kRowWarps, 0, stream>>>(p, workspace);
    TTF_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace torchtune_fused
