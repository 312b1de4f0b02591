// Gradients of attention of many queries with mma, for 8.0 and up.
//
// Grid: a block for each tile of N keys of each key head, in the order of flash_schedule.h.
// Block: kKeyWarps x kSplits warps.
// A warp owns 16 kTilesN keys: it makes transposed scores S^T = K Q^T and dP^T = V dO^T, [keys,
// queries], whose registers are already the A fragments of dV += P^T dO and dK += dS^T Q, summed in
// registers over all queries and all heads that read the key head. kSplits warps share the same
// keys where head_dim is too large, and divide the columns of dK and dV.
// Only dS^T passes through shared memory: for dQ = dS K, which sums over the keys of all warps.
// That product runs one tile of queries late, so that one barrier a tile is enough, and its result
// is added to fp32 sums in global memory. (Dao, FlashAttention-2, 2023, has the formulas.)
// Shared memory: keys [N, D], two stages of queries and of gradients of the output [kBlockM, D]
// (first of all the values pass through these, on the way to registers), two of dS^T [N, kBlockM],
// and two of the queries' statistics.
#pragma once

#include <algorithm>

#include "attention/flash_backward_q_sm80.cuh"
#include "attention/flash_mask.cuh"
#include "attention/flash_tiles.cuh"
#include "common/launch.h"

namespace torchtune_fused {

template <int D, bool kSm90>
struct BackwardTiles {
  // Before 9.0 all must fit into the 99 KB of 8.6.
  static constexpr int kBlockM = D == 256 ? 16 : D == 128 && kSm90 ? 64 : 32;
  static constexpr int kTilesN = D == 64 ? 2 : 1;
  static constexpr int kKeyWarps = D == 96 || D == 128 ? 8 : 4;
  static constexpr int kSplits = D == 256 ? 2 : 1;
  static constexpr int kBlockN = 16 * kTilesN * kKeyWarps;
  static constexpr int kWarps = kKeyWarps * kSplits;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQueryTiles = kBlockM / 16;
  // dQ: a warp makes 16 queries times so many columns.
  static constexpr int kColumnsQ = D * kQueryTiles / kWarps;
  static constexpr int kKeyBytes = kBlockN * D * 2;
  static constexpr int kQueryBytes = kBlockM * D * 2;
  static constexpr int kScoreBytes = kBlockN * kBlockM * 2;
  static constexpr int kStatBytes = kBlockM * static_cast<int>(sizeof(RowStats));
  static constexpr int kShared =
      kKeyBytes + std::max(kKeyBytes, 4 * kQueryBytes + 2 * kScoreBytes + 2 * kStatBytes);
  static_assert(kBackwardRows % kBlockM == 0 && kColumnsQ % 8 == 0);
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <int D>
using CompiledBackwardTiles = BackwardTiles<D, false>;
#else
template <int D>
using CompiledBackwardTiles = BackwardTiles<D, true>;
#endif

template <typename T, int D>
__global__ void __launch_bounds__(CompiledBackwardTiles<D>::kThreads)
    flash_backward_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                          const __grid_constant__ FlashBackwardWorkspace workspace,
                          const __grid_constant__ ScoreScale scale,
                          const __grid_constant__ Schedule schedule) {
  using Tiles = CompiledBackwardTiles<D>;
  constexpr int kBlockM = Tiles::kBlockM, kBlockN = Tiles::kBlockN, kThreads = Tiles::kThreads;
  constexpr int kTilesN = Tiles::kTilesN, kKeyWarps = Tiles::kKeyWarps, kSplits = Tiles::kSplits;
  constexpr int kOwnColumns = D / kSplits;
  const FlashAttentionParams& p = params.forward;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group_row = lane / 4, quad = lane % 4;
  const int key_warp = warp % kKeyWarps, split = warp / kKeyWarps;

  int tile_n, kv_head;
  schedule.locate(blockIdx.x, tile_n, kv_head);
  const int batch = kv_head / p.kv_heads;
  kv_head %= p.kv_heads;
  const int first_key = tile_n * kBlockN;
  const int keys = min(kBlockN, p.keys - first_key);
  const int heads_per_group = p.heads / p.kv_heads;
  const T* k = static_cast<const T*>(p.k) + batch * p.k_stride[0] + kv_head * p.k_stride[1] +
               first_key * p.k_stride[2];
  const T* v = static_cast<const T*>(p.v) + batch * p.v_stride[0] + kv_head * p.v_stride[1] +
               first_key * p.v_stride[2];

  const uint32_t k_tile = shared_address(shared);
  const uint32_t stages = k_tile + Tiles::kKeyBytes;
  const uint32_t scores = stages + 4 * Tiles::kQueryBytes;
  const uint32_t stats = scores + 2 * Tiles::kScoreBytes;

  load_tile<kBlockN, D, kThreads>(k_tile, k, p.k_stride[2], keys, p.head_dim);
  load_tile<kBlockN, D, kThreads>(stages, v, p.v_stride[2], keys, p.head_dim);
  copy_async_commit();

  // The tiles of queries of each head of the group, one after the other.
  int head = kv_head * heads_per_group, next_head = head;
  const auto kind_of = [&](int tile) {
    const Range queries = {tile * kBlockM, min((tile + 1) * kBlockM, p.queries)};
    return kind_of_queries(p, batch, next_head, queries, {first_key, first_key + kBlockN});
  };
  const int begin = queries_of_key(p, batch, first_key).begin / kBlockM;
  const int end =
      (min(queries_of_key(p, batch, first_key + keys - 1).end, p.queries) + kBlockM - 1) / kBlockM;
  TileWalk walk(begin, end, kind_of);
  const auto advance = [&] {
    VisitedTile tile = walk.next();
    while (!tile.exists() && ++next_head < (kv_head + 1) * heads_per_group) {
      walk.restart(begin);
      tile = walk.next();
    }
    return tile;
  };
  const auto load_queries = [&](int tile, int stage) {
    const int first = tile * kBlockM;
    const uint32_t q_tile = stages + stage * 2 * Tiles::kQueryBytes;
    load_tile<kBlockM, D, kThreads>(q_tile,
                                    static_cast<const T*>(p.q) + batch * p.q_stride[0] +
                                        next_head * p.q_stride[1] + first * p.q_stride[2],
                                    p.q_stride[2], p.queries - first, p.head_dim);
    load_tile<kBlockM, D, kThreads>(
        q_tile + Tiles::kQueryBytes,
        static_cast<const T*>(params.grad_out) + batch * params.grad_out_stride[0] +
            next_head * params.grad_out_stride[1] + first * params.grad_out_stride[2],
        params.grad_out_stride[2], p.queries - first, p.head_dim);
    if (threadIdx.x < kBlockM / 2) {
      copy_async_16(
          stats + stage * Tiles::kStatBytes + threadIdx.x * 16,
          workspace.stats +
              (static_cast<int64_t>(batch) * p.heads + next_head) * workspace.padded_queries +
              first + 2 * threadIdx.x,
          true);
    }
  };

  MatrixReader<D> read_rows = row_reader<D>(lane), read_columns = column_reader<D>(lane);
  MatrixReader<kBlockM> read_scores = column_reader<kBlockM>(lane);
  const int warp_key = key_warp * kTilesN * 16;
  copy_async_wait<0>();
  __syncthreads();
  uint32_t values[kTilesN][D / 16][4];  // of the warp's keys, as A fragments
#pragma unroll
  for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      load_matrix_x4(values[i][kk], read_rows(stages, warp_key + 16 * i, kk));
    }
  }
  __syncthreads();

  float grad_k[kTilesN][kOwnColumns / 8][4] = {}, grad_v[kTilesN][kOwnColumns / 8][4] = {};

  // dQ = dS K of 16 queries and some columns, over all keys of the block.
  const auto add_grad_q = [&](int of_head, int tile, uint32_t score_tile) {
    constexpr int kColumns = Tiles::kColumnsQ;
    const int query_tile = warp % Tiles::kQueryTiles;
    const int first_piece = warp / Tiles::kQueryTiles * (kColumns / 8);
    float sum[kColumns / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < kBlockN / 32; ++kk) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrix_x4_transposed(a[i], read_scores(score_tile, kk * 32 + i * 16, query_tile));
      }
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, k_tile + Tile<D>::offset(kk * 32 + lane, first_piece + n));
        mma_16x8x16<T>(sum[n], a[0][0], a[0][1], a[0][2], a[0][3], b[0], b[1]);
        mma_16x8x16<T>(sum[n], a[1][0], a[1][1], a[1][2], a[1][3], b[2], b[3]);
      }
    }
    const int64_t first_row =
        (static_cast<int64_t>(batch) * p.heads + of_head) * workspace.padded_queries +
        tile * kBlockM;
    const int64_t row_tile = first_row / 16 + query_tile;
    float* target = workspace.grad_q + (row_tile * (D / 8) + first_piece) * 128;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) add_fragment(target + n * 128, lane, sum[n]);
  };

  VisitedTile tile = advance();
  int last_tile = -1, last_head = 0, stage = 0;
  if (tile.exists()) load_queries(tile.index(), 0);
  head = next_head;
  copy_async_commit();

  for (; tile.exists(); stage ^= 1) {
    const uint32_t q_tile = stages + stage * 2 * Tiles::kQueryBytes;
    const uint32_t do_tile = q_tile + Tiles::kQueryBytes;
    const uint32_t score_tile = scores + stage * Tiles::kScoreBytes;
    const VisitedTile next = advance();
    read_rows.forget();
    read_columns.forget();
    read_scores.forget();
    copy_async_wait<0>();
    __syncthreads();  // the queries and the last dS are there, and the other stage is free
    if (next.exists()) load_queries(next.index(), stage ^ 1);
    copy_async_commit();
    if (last_tile >= 0 && !params.deterministic) {
      add_grad_q(last_head, last_tile, scores + (stage ^ 1) * Tiles::kScoreBytes);
    }

    // S^T = K Q^T.
    float s[kTilesN][kBlockM / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a[kTilesN][4];
#pragma unroll
      for (int i = 0; i < kTilesN; ++i)
        load_matrix_x4(a[i], read_rows(k_tile, warp_key + 16 * i, kk));
#pragma unroll
      for (int m = 0; m < kBlockM / 16; ++m) {
        uint32_t b[4];
        load_matrix_x4(b, read_columns(q_tile, 16 * m, kk));
#pragma unroll
        for (int i = 0; i < kTilesN; ++i) {
          mma_16x8x16<T>(s[i][2 * m], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
          mma_16x8x16<T>(s[i][2 * m + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
        }
      }
    }
    if (scale.bent) {
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
        for (int m = 0; m < kBlockM / 8; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][m][e] = scale.bend(s[i][m][e]);
        }
      }
    }
    if (tile.partial()) {
      mask_scores_transposed<kBlockM>(s, p, batch, head, tile.index() * kBlockM,
                                      first_key + warp_key);
    }
    // P^T = exp(S^T - lse), rounded at once: fp32 copies would not fit into the registers.
    uint32_t pt[kTilesN][kBlockM / 8][2];  // of rows group_row and group_row + 8
#pragma unroll
    for (int m = 0; m < kBlockM / 8; ++m) {
      const uint32_t at = stats + stage * Tiles::kStatBytes + (m * 8 + quad * 2) * sizeof(RowStats);
      const uint4 words = load_shared_16(at);
      const float lse[2] = {__uint_as_float(words.x), __uint_as_float(words.z)};
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          pt[i][m][j] = pack<T>(exp2_fast(fmaf(s[i][m][2 * j], scale.factor, -lse[0])),
                                exp2_fast(fmaf(s[i][m][2 * j + 1], scale.factor, -lse[1])));
        }
      }
    }

    // dP^T = V dO^T, and dS^T = P^T (dP^T - delta), times the softcap's slope.
    float dp[kTilesN][kBlockM / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
#pragma unroll
      for (int m = 0; m < kBlockM / 16; ++m) {
        uint32_t b[4];
        load_matrix_x4(b, read_columns(do_tile, 16 * m, kk));
#pragma unroll
        for (int i = 0; i < kTilesN; ++i) {
          const uint32_t (&a)[4] = values[i][kk];
          mma_16x8x16<T>(dp[i][2 * m], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma_16x8x16<T>(dp[i][2 * m + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
    }

    uint32_t dst[kTilesN][kBlockM / 8][2];
#pragma unroll
    for (int m = 0; m < kBlockM / 8; ++m) {
      const uint32_t at = stats + stage * Tiles::kStatBytes + (m * 8 + quad * 2) * sizeof(RowStats);
      const uint4 words = load_shared_16(at);
      const RowStats first = {__uint_as_float(words.x), __uint_as_float(words.y)};
      const RowStats second = {__uint_as_float(words.z), __uint_as_float(words.w)};
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 probability = unpack<T>(pt[i][m][j]);
          float left = probability.x * (dp[i][m][2 * j] - first.delta);
          float right = probability.y * (dp[i][m][2 * j + 1] - second.delta);
          if (scale.outer != 0.f) {
            left *= scale.slope(probability.x, first.lse);
            right *= scale.slope(probability.y, second.lse);
          }
          dst[i][m][j] = pack<T>(left, right);
          if (kSplits == 1 || split == 0) {
            store_shared_4(score_tile + quad * 4 +
                               Tile<kBlockM>::offset(warp_key + i * 16 + j * 8 + group_row, m),
                           dst[i][m][j]);
          }
        }
      }
    }

    // dV += P^T dO and dK += dS^T Q.
#pragma unroll
    for (int m = 0; m < kBlockM / 16; ++m) {
#pragma unroll
      for (int d = 0; d < kOwnColumns / 16; ++d) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, read_rows(do_tile, 16 * m, split * (kOwnColumns / 16) + d));
#pragma unroll
        for (int i = 0; i < kTilesN; ++i) {
          const uint32_t (&low)[2] = pt[i][2 * m], (&high)[2] = pt[i][2 * m + 1];
          mma_16x8x16<T>(grad_v[i][2 * d], low[0], low[1], high[0], high[1], b[0], b[1]);
          mma_16x8x16<T>(grad_v[i][2 * d + 1], low[0], low[1], high[0], high[1], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kBlockM / 16; ++m) {
#pragma unroll
      for (int d = 0; d < kOwnColumns / 16; ++d) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, read_rows(q_tile, 16 * m, split * (kOwnColumns / 16) + d));
#pragma unroll
        for (int i = 0; i < kTilesN; ++i) {
          const uint32_t (&low)[2] = dst[i][2 * m], (&high)[2] = dst[i][2 * m + 1];
          mma_16x8x16<T>(grad_k[i][2 * d], low[0], low[1], high[0], high[1], b[0], b[1]);
          mma_16x8x16<T>(grad_k[i][2 * d + 1], low[0], low[1], high[0], high[1], b[2], b[3]);
        }
      }
    }
    last_tile = tile.index();
    last_head = head;
    tile = next;
    head = next_head;
  }
  if (last_tile >= 0 && !params.deterministic) {
    __syncthreads();
    add_grad_q(last_head, last_tile, scores + (stage ^ 1) * Tiles::kScoreBytes);
  }

  T* grad_k_rows = static_cast<T*>(params.grad_k) + batch * params.grad_k_stride[0] +
                   kv_head * params.grad_k_stride[1] + first_key * params.grad_k_stride[2];
  T* grad_v_rows = static_cast<T*>(params.grad_v) + batch * params.grad_v_stride[0] +
                   kv_head * params.grad_v_stride[1] + first_key * params.grad_v_stride[2];
  const float factor = static_cast<float>(p.scale);
#pragma unroll
  for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = warp_key + i * 16 + j * 8 + group_row;
      if (row >= keys) continue;
#pragma unroll
      for (int d = 0; d < kOwnColumns / 8; ++d) {
        const int column = split * kOwnColumns + d * 8 + quad * 2;
        if (split * kOwnColumns + d * 8 >= p.head_dim) break;
        const float *dk = &grad_k[i][d][2 * j], *dv = &grad_v[i][d][2 * j];
        *reinterpret_cast<uint32_t*>(grad_k_rows + row * params.grad_k_stride[2] + column) =
            pack<T>(dk[0] * factor, dk[1] * factor);
        *reinterpret_cast<uint32_t*>(grad_v_rows + row * params.grad_v_stride[2] + column) =
            pack<T>(dv[0], dv[1]);
      }
    }
  }
}

template <typename T, int D>
void launch_flash_backward_keys(const FlashAttentionBackwardParams& p,
                                const FlashBackwardWorkspace& workspace, cudaStream_t stream) {
  using Tiles = BackwardTiles<D, true>;  // of which 8.x differs in kBlockM only
  const int bytes = runs_sm90_code() ? Tiles::kShared : BackwardTiles<D, false>::kShared;
  const auto kernel = flash_backward_kernel<T, D>;
  allow_shared_memory(kernel, bytes);
  const FlashAttentionParams& f = p.forward;
  const Schedule schedule = Schedule::make(static_cast<int64_t>(f.batch) * f.kv_heads,
                                           (f.keys + Tiles::kBlockN - 1) / Tiles::kBlockN, 1,
                                           int64_t{8} * f.queries * D, 1);
  kernel<<<schedule.blocks(), Tiles::kThreads, bytes, stream>>>(p, workspace, ScoreScale(f),
                                                                schedule);
  TTF_CUDA_CHECK(cudaGetLastError());
}

// Instantiated once per padded head dimension, each in a file of its own.
template <int D>
struct FlashBackwardSm80 {
  static void launch(const FlashAttentionBackwardParams& params,
                     const FlashBackwardWorkspace& workspace, cudaStream_t stream);
};

template <int D>
void FlashBackwardSm80<D>::launch(const FlashAttentionBackwardParams& p,
                                  const FlashBackwardWorkspace& workspace, cudaStream_t stream) {
  if (p.forward.dtype == DType::kFloat16) {
    launch_flash_backward_keys<__half, D>(p, workspace, stream);
    if (p.deterministic) launch_flash_backward_q<__half, D>(p, workspace, stream);
  } else {
    launch_flash_backward_keys<__nv_bfloat16, D>(p, workspace, stream);
    if (p.deterministic) launch_flash_backward_q<__nv_bfloat16, D>(p, workspace, stream);
  }
}

}  // namespace torchtune_fused
