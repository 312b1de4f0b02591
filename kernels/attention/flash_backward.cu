// The passes of the backward: the queries' statistics, then the gradients, then dQ in its own type.
#include "attention/flash_backward.h"
#include "attention/flash_tiles.cuh"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "rope/angles.cuh"

namespace torchtune_fused {

// Defined in flash_backward_sm80.cuh and flash_backward_sm90.cuh.
template <int D>
struct FlashBackwardSm80 {
  static void launch(const FlashAttentionBackwardParams& params,
                     const FlashBackwardWorkspace& workspace, cudaStream_t stream);
};
template <int D>
struct FlashBackwardSm90 {
  static void launch(const FlashAttentionBackwardParams& params,
                     const FlashBackwardWorkspace& workspace, cudaStream_t stream);
};

namespace {

// ---- The passes before and after: a block for kBackwardRows queries of some heads ---------------

constexpr int kRowThreads = 256;
constexpr int kConvertHeads = 4;  // of a block

// Where a block's queries are. Heads come first, since in memory they mostly lie side by side.
struct QueryBlock {
  int batch, head, first;  // query
  int64_t row;             // in the workspace

  __device__ __forceinline__ QueryBlock(const FlashAttentionParams& p,
                                        const FlashBackwardWorkspace& workspace,
                                        int heads_per_block = 1) {
    const int blocks = workspace.padded_queries / kBackwardRows;  // of a head
    const int groups = (p.heads + heads_per_block - 1) / heads_per_block;
    head = blockIdx.x % groups * heads_per_block;
    first = blockIdx.x / groups % blocks * kBackwardRows;
    batch = blockIdx.x / groups / blocks;
    row = (int64_t{batch} * p.heads + head) * workspace.padded_queries + first;
  }
};

// delta = sum(grad_out * out) by kLanes lanes a query, padding included, and zeros for the sums of
// dQ. Without a bound on blocks ptxas aims at so few registers that it spills.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kRowThreads, 2)
    row_stats_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                     const __grid_constant__ FlashBackwardWorkspace workspace) {
  constexpr int kStep = kRowThreads / kLanes, kBatch = 4;  // queries, and loads, at a time
  const FlashAttentionParams& p = params.forward;
  const QueryBlock at(p, workspace);
  const int lane = threadIdx.x % kLanes, column = lane * 8;
  const T* out = static_cast<const T*>(p.out) + at.batch * p.out_stride[0] +
                 at.head * p.out_stride[1] + column;
  const T* grad = static_cast<const T*>(params.grad_out) + at.batch * params.grad_out_stride[0] +
                  at.head * params.grad_out_stride[1] + column;
  const float* lse = p.lse + (int64_t{at.batch} * p.heads + at.head) * p.queries;
#pragma unroll 1
  for (int i = threadIdx.x / kLanes; i < kBackwardRows; i += kBatch * kStep) {
    uint4 o[kBatch] = {}, g[kBatch] = {};
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int query = at.first + i + j * kStep;
      if (query >= p.queries || column >= p.head_dim) continue;
      o[j] = *reinterpret_cast<const uint4*>(out + query * p.out_stride[2]);
      g[j] = *reinterpret_cast<const uint4*>(grad + query * params.grad_out_stride[2]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int query = at.first + i + j * kStep;
      float delta = dot<T>(o[j], g[j]);
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        delta += __shfl_xor_sync(~0u, delta, offset);
      }
      if (lane == 0) {
        workspace.stats[at.row + i + j * kStep] = {
            query < p.queries ? lse[query] * kLog2E : 0.f, delta};
      }
    }
  }
  if (params.deterministic) return;
  float4* sums = reinterpret_cast<float4*>(workspace.grad_q + at.row * workspace.padded_dim);
  const int count = kBackwardRows * workspace.padded_dim / 4;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kRowThreads) sums[i] = {0.f, 0.f, 0.f, 0.f};
}

template <typename T>
__device__ __forceinline__ void store_scaled(T* to, const float (&v)[8], float scale) {
  *reinterpret_cast<uint4*>(to) = {
      pack<T>(v[0] * scale, v[1] * scale), pack<T>(v[2] * scale, v[3] * scale),
      pack<T>(v[4] * scale, v[5] * scale), pack<T>(v[6] * scale, v[7] * scale)};
}

// The gradient of the columns `low` and of those half a head further on, `high`, of one row.
struct GradRow {
  float low[8], high[8];
};

// Angles of the pairs among them.
struct Angles {
  float cos[8], sin[8];
};

__device__ __forceinline__ void load_angles(const RopeParams& rope, const QueryBlock& at, int query,
                                            int column, int half, Angles& angles) {
  if (query >= rope.steps) return;
  const int64_t position = position_of(rope, at.batch, query);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int first = rope.interleaved ? (j < 4 ? column / 2 : (column + half) / 2 - 4) : column;
    load_angle(rope, position, first + j, angles.cos[j], angles.sin[j]);
  }
}

__device__ __forceinline__ void turn_row_back(const RopeParams& rope, const Angles& angles,
                                          GradRow& row) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (rope.interleaved) {
      float* pair = (j < 4 ? row.low : row.high) + j % 4 * 2;
      turn_pair_back(pair[0], pair[1], angles.cos[j], angles.sin[j]);
    } else {
      turn_pair_back(row.low[j], row.high[j], angles.cos[j], angles.sin[j]);
    }
  }
}

// Whether convert_grad_q_kernel can turn what it converts: its vectors must not straddle halves.
bool turns_vectors(const FlashAttentionBackwardParams& p) {
  return p.rope.cos != nullptr && p.forward.head_dim % 16 == 0;
}

// The fp32 sums of dQ, times the scale and turned back by the angles of q's rotation. A warp takes
// 16 rows of a few heads, which share their angles; a lane takes two rows, 8 columns and the 8 half
// a head further on.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    convert_grad_q_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                          const __grid_constant__ FlashBackwardWorkspace workspace, bool turns) {
  const FlashAttentionParams& p = params.forward;
  const QueryBlock at(p, workspace, kConvertHeads);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = at.first + warp * 16 + lane / 4;
  const int heads = min(kConvertHeads, p.heads - at.head);
  const int half = (p.head_dim / 2 + 7) / 8 * 8;
  const float scale = static_cast<float>(p.scale);
  for (int column = lane % 4 * 8; column < half; column += 32) {
    const float* sums = workspace.grad_q + (at.row + warp * 16) * workspace.padded_dim + column * 16;
    T* rows = static_cast<T*>(params.grad_q) + at.batch * params.grad_q_stride[0] +
              at.head * params.grad_q_stride[1] + column;
    Angles angles[2];
    if (turns) {
      load_angles(params.rope, at, first, column, half, angles[0]);
      load_angles(params.rope, at, first + 8, column, half, angles[1]);
    }
#pragma unroll 1
    for (int head = 0; head < heads; ++head) {
      GradRow grads[2];
      read_fragment_rows(grads[0].low, grads[1].low, sums, lane / 4);
      read_fragment_rows(grads[0].high, grads[1].high, sums + half * 16, lane / 4);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int query = first + j * 8;
        if (query >= p.queries) continue;
        if (turns) turn_row_back(params.rope, angles[j], grads[j]);
        T* row = rows + query * params.grad_q_stride[2];
        store_scaled(row, grads[j].low, scale);
        if (column + half < p.head_dim) store_scaled(row + half, grads[j].high, scale);
      }
      sums += int64_t{workspace.padded_queries} * workspace.padded_dim;
      rows += params.grad_q_stride[1];
    }
  }
}

// ---- The gradients ------------------------------------------------------------------------------

#ifdef TTF_HAS_SM90
// Whether Hopper's kernel takes the case.
bool sm90_takes(const FlashAttentionBackwardParams& p) {
  const FlashAttentionParams& f = p.forward;
  return runs_sm90_code() && (f.head_dim == 64 || f.head_dim == 128) && f.scale > 0 &&
         f.softcap == 0 && !p.deterministic &&
         copyable(f.q, f.q_stride, f.batch, f.heads, f.queries) &&
         copyable(f.k, f.k_stride, f.batch, f.kv_heads, f.keys) &&
         copyable(f.v, f.v_stride, f.batch, f.kv_heads, f.keys) &&
         copyable(p.grad_out, p.grad_out_stride, f.batch, f.heads, f.queries);
}
#endif

// Returns whether grad_k is turned back, too, where it is the gradient of a rotation.
bool launch_gradients(const FlashAttentionBackwardParams& p, const FlashBackwardWorkspace& workspace,
                      cudaStream_t stream) {
#ifdef TTF_HAS_SM90
  if (sm90_takes(p)) {
    const auto launch =
        p.forward.head_dim == 64 ? FlashBackwardSm90<64>::launch : FlashBackwardSm90<128>::launch;
    launch(p, workspace, stream);
    return true;
  }
#endif
  switch (workspace.padded_dim) {
    case 64: FlashBackwardSm80<64>::launch(p, workspace, stream); break;
    case 96: FlashBackwardSm80<96>::launch(p, workspace, stream); break;
    case 128: FlashBackwardSm80<128>::launch(p, workspace, stream); break;
    default: FlashBackwardSm80<256>::launch(p, workspace, stream);
  }
  return false;
}

template <typename T>
void launch_passes(const FlashAttentionBackwardParams& p, const FlashBackwardWorkspace& workspace,
                   cudaStream_t stream) {
  const FlashAttentionParams& f = p.forward;
  const int64_t blocks = workspace.rows(p) / kBackwardRows;
  TTF_CHECK(blocks < int64_t{1} << 31, "too many queries: ", workspace.rows(p));
  const int d = workspace.padded_dim;
  const auto row_stats = d == 64    ? row_stats_kernel<T, 8>
                         : d <= 128 ? row_stats_kernel<T, 16>
                                    : row_stats_kernel<T, 32>;
  row_stats<<<static_cast<unsigned>(blocks), kRowThreads, 0, stream>>>(p, workspace);
  TTF_CUDA_CHECK(cudaGetLastError());
  RopeParams rope = p.rope;  // what is left of it
  if (launch_gradients(p, workspace, stream)) rope.of[1].heads = 0;
  if (!p.deterministic) {
    const int64_t groups = (f.heads + kConvertHeads - 1) / kConvertHeads;
    const bool turns = turns_vectors(p);
    convert_grad_q_kernel<T><<<static_cast<unsigned>(blocks / f.heads * groups), kRowThreads, 0,
                               stream>>>(p, workspace, turns);
    TTF_CUDA_CHECK(cudaGetLastError());
    if (turns) rope.of[0].heads = 0;
  }
  if (rope.cos == nullptr) return;
  plan_rope(rope);
  launch_rope(rope, stream);
}

}  // namespace

int64_t flash_backward_workspace(const FlashAttentionBackwardParams& p) {
  const FlashBackwardWorkspace workspace(p, nullptr);
  return workspace.rows(p) * static_cast<int64_t>(sizeof(RowStats)) + workspace.grad_q_bytes(p);
}

void launch_flash_backward(const FlashAttentionBackwardParams& p, void* memory,
                           cudaStream_t stream) {
  const int d = p.forward.head_dim;
  TTF_CHECK(d > 0 && d <= 256 && d % 8 == 0,
            "the head dimension must be a multiple of 8 up to 256, got ", d);
  TTF_CHECK(p.forward.length == nullptr, "the backward takes no length");
  TTF_CHECK(p.forward.batch > 0 && p.forward.queries > 0 && p.forward.keys > 0,
            "the backward needs at least one query and one key, got ", p.forward.batch,
            " batches of ", p.forward.queries, " queries and ", p.forward.keys, " keys");
  const FlashBackwardWorkspace workspace(p, memory);
  if (p.forward.dtype == DType::kFloat16) {
    launch_passes<__half>(p, workspace, stream);
  } else {
    launch_passes<__nv_bfloat16>(p, workspace, stream);
  }
}

}  // namespace torchtune_fused
