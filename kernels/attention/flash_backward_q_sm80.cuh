// The gradient of the queries by itself, for runs that must give the same bits every time: it makes
// the scores again, where flash_backward_sm80.cuh would add to sums in an order left to chance.
//
// Grid: a block for each tile of 16 kWarps queries of each head, in the order of flash_schedule.h.
// Block: kWarps warps of 16 queries each: S = Q K^T and dP = dO V^T, whose registers are the A
// fragments of dQ += dS K. Shared memory: queries and gradients of the output [16 kWarps, D], then
// two stages of keys and values [kBlockN, D].
#pragma once

#include "attention/flash_backward.h"
#include "attention/flash_mask.cuh"
#include "attention/flash_schedule.h"
#include "attention/flash_tiles.cuh"
#include "common/launch.h"

namespace torchtune_fused {

template <typename T, int D, int kBlockN, int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    flash_backward_q_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                            const __grid_constant__ FlashBackwardWorkspace workspace,
                            const __grid_constant__ ScoreScale scale,
                            const __grid_constant__ Schedule schedule) {
  constexpr int kThreads = 32 * kWarps, kBlockM = 16 * kWarps;
  constexpr uint32_t kQueryBytes = kBlockM * D * 2, kKeyBytes = kBlockN * D * 2;
  const FlashAttentionParams& p = params.forward;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group_row = lane / 4, quad = lane % 4;

  int tile_m, head;
  schedule.locate(blockIdx.x, tile_m, head);
  const int batch = head / p.heads;
  head %= p.heads;
  const int first_query = (schedule.tiles - 1 - tile_m) * kBlockM;
  const int queries = min(kBlockM, p.queries - first_query);
  const int kv_head = head / (p.heads / p.kv_heads);
  const T* k = static_cast<const T*>(p.k) + batch * p.k_stride[0] + kv_head * p.k_stride[1];
  const T* v = static_cast<const T*>(p.v) + batch * p.v_stride[0] + kv_head * p.v_stride[1];
  const uint32_t q_tile = shared_address(shared), do_tile = q_tile + kQueryBytes;
  const uint32_t ring = do_tile + kQueryBytes;

  const auto kind_of = [&](int tile) {
    const Range keys = {tile * kBlockN, (tile + 1) * kBlockN};
    return kind_of_keys(p, batch, head, {first_query, first_query + queries}, keys, p.keys);
  };
  const int begin = keys_of_query(p, batch, first_query, p.keys).begin / kBlockN;
  const int end = keys_of_query(p, batch, first_query + queries - 1, p.keys).end;
  TileWalk walk(begin, (end + kBlockN - 1) / kBlockN, kind_of);
  const auto load_keys = [&](int tile, int stage) {
    const int first = tile * kBlockN;
    load_tile<kBlockN, D, kThreads>(ring + stage * 2 * kKeyBytes, k + first * p.k_stride[2],
                                    p.k_stride[2], p.keys - first, p.head_dim);
    load_tile<kBlockN, D, kThreads>(ring + (stage * 2 + 1) * kKeyBytes, v + first * p.v_stride[2],
                                    p.v_stride[2], p.keys - first, p.head_dim);
  };

  VisitedTile tile = walk.next();
  load_tile<kBlockM, D, kThreads>(q_tile,
                                  static_cast<const T*>(p.q) + batch * p.q_stride[0] +
                                      head * p.q_stride[1] + first_query * p.q_stride[2],
                                  p.q_stride[2], queries, p.head_dim);
  load_tile<kBlockM, D, kThreads>(
      do_tile,
      static_cast<const T*>(params.grad_out) + batch * params.grad_out_stride[0] +
          head * params.grad_out_stride[1] + first_query * params.grad_out_stride[2],
      params.grad_out_stride[2], queries, p.head_dim);
  if (tile.exists()) load_keys(tile.index(), 0);
  copy_async_commit();

  MatrixReader<D> read_rows = row_reader<D>(lane), read_columns = column_reader<D>(lane);
  const int warp_row = warp * 16;
  RowStats stats[2];  // of rows group_row and group_row + 8
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    stats[j] =
        workspace.stats[(static_cast<int64_t>(batch) * p.heads + head) * workspace.padded_queries +
                        first_query + warp_row + j * 8 + group_row];
  }
  float grad_q[D / 8][4] = {};

  for (int stage = 0; tile.exists(); stage ^= 1) {
    const uint32_t k_tile = ring + stage * 2 * kKeyBytes, v_tile = k_tile + kKeyBytes;
    const VisitedTile next = walk.next();
    forget(k);
    forget(v);
    read_rows.forget();
    read_columns.forget();
    copy_async_wait<0>();
    __syncthreads();
    if (next.exists()) load_keys(next.index(), stage ^ 1);
    copy_async_commit();

    float s[1][kBlockN / 8][4] = {}, dp[kBlockN / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t q[4], grad[4];
      load_matrix_x4(q, read_rows(q_tile, warp_row, kk));
      load_matrix_x4(grad, read_rows(do_tile, warp_row, kk));
#pragma unroll
      for (int n = 0; n < kBlockN / 16; ++n) {
        uint32_t b[4];
        load_matrix_x4(b, read_columns(k_tile, 16 * n, kk));
        mma_16x8x16<T>(s[0][2 * n], q[0], q[1], q[2], q[3], b[0], b[1]);
        mma_16x8x16<T>(s[0][2 * n + 1], q[0], q[1], q[2], q[3], b[2], b[3]);
        load_matrix_x4(b, read_columns(v_tile, 16 * n, kk));
        mma_16x8x16<T>(dp[2 * n], grad[0], grad[1], grad[2], grad[3], b[0], b[1]);
        mma_16x8x16<T>(dp[2 * n + 1], grad[0], grad[1], grad[2], grad[3], b[2], b[3]);
      }
    }
    if (scale.bent) {
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[0][n][e] = scale.bend(s[0][n][e]);
      }
    }
    if (tile.partial()) {
      mask_scores<0, kBlockN>(s, p, batch, head, p.keys, first_query + warp_row, 16,
                              tile.index() * kBlockN);
    }
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const RowStats& row = stats[e / 2];
        const float probability = exp2_fast(fmaf(s[0][n][e], scale.factor, -row.lse));
        dp[n][e] = probability * (dp[n][e] - row.delta);
        if (scale.outer != 0.f) dp[n][e] *= scale.slope(probability, row.lse);
      }
    }
#pragma unroll
    for (int kk = 0; kk < kBlockN / 16; ++kk) {
      const float (&low)[4] = dp[2 * kk], (&high)[4] = dp[2 * kk + 1];
      const uint32_t a[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]),
                             pack<T>(high[0], high[1]), pack<T>(high[2], high[3])};
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, read_rows(k_tile, 16 * kk, d));
        mma_16x8x16<T>(grad_q[2 * d], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_16x8x16<T>(grad_q[2 * d + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
      }
    }
    tile = next;
  }
  copy_async_wait<0>();

  T* target = static_cast<T*>(params.grad_q) + batch * params.grad_q_stride[0] +
              head * params.grad_q_stride[1] + first_query * params.grad_q_stride[2];
  const float factor = static_cast<float>(p.scale);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int row = warp_row + j * 8 + group_row;
    if (row >= queries) continue;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      if (d * 8 >= p.head_dim) break;
      *reinterpret_cast<uint32_t*>(target + row * params.grad_q_stride[2] + d * 8 + quad * 2) =
          pack<T>(grad_q[d][2 * j] * factor, grad_q[d][2 * j + 1] * factor);
    }
  }
}

template <typename T, int D>
void launch_flash_backward_q(const FlashAttentionBackwardParams& p,
                             const FlashBackwardWorkspace& workspace, cudaStream_t stream) {
  constexpr int kBlockN = D == 256 ? 32 : 64, kWarps = D == 256 ? 2 : 4;
  constexpr int kBlockM = 16 * kWarps, kBytes = (2 * kBlockM + 4 * kBlockN) * D * 2;
  const auto kernel = flash_backward_q_kernel<T, D, kBlockN, kWarps>;
  allow_shared_memory(kernel, kBytes);
  const FlashAttentionParams& f = p.forward;
  const Schedule schedule =
      Schedule::make(static_cast<int64_t>(f.batch) * f.heads, (f.queries + kBlockM - 1) / kBlockM,
                     f.heads / f.kv_heads, int64_t{4} * f.keys * D * f.kv_heads / f.heads, 2);
  kernel<<<schedule.blocks(), 32 * kWarps, kBytes, stream>>>(p, workspace, ScoreScale(f), schedule);
  TTF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace torchtune_fused
