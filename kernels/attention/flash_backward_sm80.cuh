// Gradients of attention of many queries with mma, for 8.0 and up.
//
// Grid: a block for each tile of kBlockN keys of each key head, in the order of flash_schedule.h.
// Block: kKeyWarps x kColumnWarps warps.
// Transposed scores S^T = K Q^T and dP^T = V dO^T, [keys, queries], have in registers the layout of
// the A fragments of dV += P^T dO and dK += dS^T Q, which are summed in registers over all queries
// and all heads that read the key head. kColumnWarps warps share the same 16 kTilesN keys: each
// makes the scores of a part of the tile's queries, as far as there are 16 for each, and then some
// columns of dK and dV from the scores of all, which pass through shared memory.
// So does dS^T for dQ = dS K, which sums over the keys of all warps; the result is added to fp32
// sums in global memory. Where only dQ needs others' scores, it is made one tile of queries late,
// so that one barrier a tile is enough. (Dao, FlashAttention-2, 2023, has the formulas.)
// What bounds these kernels is the reading of fragments from shared memory: 0.3 to 0.6 ldmatrix an
// mma, so the tiles are as large as registers and shared memory permit.
// Shared memory: keys [kBlockN, D], two stages of the queries' statistics and of queries and
// gradients of the output [kBlockM, D], values [kBlockN, D] unless they are held in registers, and
// two tiles of scores [kBlockN, kBlockM]: P^T and dS^T, or two stages of dS^T.
#pragma once

#include <algorithm>

#include "attention/flash_backward_q_sm80.cuh"
#include "attention/flash_mask.cuh"
#include "attention/flash_tiles.cuh"
#include "common/launch.h"

namespace torchtune_fused {

// kLarge: for 160 KB of shared memory; else all must fit into the 99 KB of 8.6.
template <int kDim, bool kLarge>
struct BackwardTiles {
  static constexpr int D = kDim;
  static constexpr int kBlockM = D == 256 ? 16 : kLarge ? 64 : 32;
  static constexpr int kTilesN = D == 64 || D == 128 ? 2 : 1;
  static constexpr int kKeyWarps = D == 96 ? 8 : 4;
  static constexpr int kColumnWarps = D == 128 || D == 256 ? 2 : 1;
  static constexpr bool kHoldValues = !kLarge;  // in registers
  static constexpr int kBlockN = 16 * kTilesN * kKeyWarps;
  static constexpr int kWarps = kKeyWarps * kColumnWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQueryTiles = kBlockM / 16;
  static constexpr int kScoreWarps = std::min(kColumnWarps, kQueryTiles);  // that divide the scores
  // dQ: a warp makes 16 kTilesQ queries times so many columns.
  static constexpr int kTilesQ = kQueryTiles / 2 > 1 ? 2 : 1;
  static constexpr int kColumnsQ = D * kQueryTiles / kTilesQ / kWarps;
  static constexpr int kKeyBytes = kBlockN * D * 2;
  static constexpr int kQueryBytes = kBlockM * D * 2;
  static constexpr int kScoreBytes = kBlockN * kBlockM * 2;
  static constexpr int kStatBytes = kBlockM * static_cast<int>(sizeof(RowStats));
  // Where things lie, after the keys. Values to be held pass through what is written later.
  static constexpr int kStats = kKeyBytes;
  static constexpr int kStages = kStats + 2 * kStatBytes;
  static constexpr int kValues = kStages + (kHoldValues ? 2 : 4) * kQueryBytes;
  static constexpr int kScores = kStages + 4 * kQueryBytes + (kHoldValues ? 0 : kKeyBytes);
  static constexpr int kShared = std::max(kScores + 2 * kScoreBytes, kValues + kKeyBytes);
  static_assert(kBackwardRows % kBlockM == 0 && kColumnsQ % 8 == 0);
};

template <typename T, typename Tiles>
__global__ void __launch_bounds__(Tiles::kThreads)
    flash_backward_kernel(const __grid_constant__ FlashAttentionBackwardParams params,
                          const __grid_constant__ FlashBackwardWorkspace workspace,
                          const __grid_constant__ ScoreScale scale,
                          const __grid_constant__ Schedule schedule) {
  constexpr int D = Tiles::D, kBlockM = Tiles::kBlockM, kBlockN = Tiles::kBlockN;
  constexpr int kThreads = Tiles::kThreads, kKeyWarps = Tiles::kKeyWarps;
  constexpr int kScoreWarps = Tiles::kScoreWarps;
  constexpr int kTilesN = Tiles::kTilesN;                     // of a warp's scores
  constexpr int kTilesM = Tiles::kQueryTiles / kScoreWarps;   // likewise
  constexpr int kOwnColumns = D / Tiles::kColumnWarps;        // of dK and dV
  constexpr bool kExchange = kScoreWarps > 1;
#if __CUDA_ARCH__ >= 900
  if constexpr (D == 128 && Tiles::kHoldValues) __trap();  // not needed: there is shared memory
#endif
  const FlashAttentionParams& p = params.forward;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group_row = lane / 4, quad = lane % 4;
  const int key_warp = warp % kKeyWarps, column_warp = warp / kKeyWarps;

  int tile_n, kv_head;
  schedule.locate(blockIdx.x, tile_n, kv_head);
  const int batch = kv_head / p.kv_heads;
  kv_head %= p.kv_heads;
  const int first_key = tile_n * kBlockN;
  const int keys = min(kBlockN, p.keys - first_key);
  const int heads_per_group = p.heads / p.kv_heads;
  const uint32_t k_tile = shared_address(shared), v_tile = k_tile + Tiles::kValues;
  load_tile<kBlockN, D, kThreads>(k_tile,
                                  static_cast<const T*>(p.k) + batch * p.k_stride[0] +
                                      kv_head * p.k_stride[1] + first_key * p.k_stride[2],
                                  p.k_stride[2], keys, p.head_dim);
  load_tile<kBlockN, D, kThreads>(v_tile,
                                  static_cast<const T*>(p.v) + batch * p.v_stride[0] +
                                      kv_head * p.v_stride[1] + first_key * p.v_stride[2],
                                  p.v_stride[2], keys, p.head_dim);

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
    const uint32_t q_tile = k_tile + Tiles::kStages + stage * 2 * Tiles::kQueryBytes;
    load_tile<kBlockM, D, kThreads>(q_tile,
                                    static_cast<const T*>(p.q) + batch * p.q_stride[0] +
                                        next_head * p.q_stride[1] + first * p.q_stride[2],
                                    p.q_stride[2], p.queries - first, p.head_dim);
    load_tile<kBlockM, D, kThreads>(
        q_tile + Tiles::kQueryBytes,
        static_cast<const T*>(params.grad_out) + batch * params.grad_out_stride[0] +
            next_head * params.grad_out_stride[1] + first * params.grad_out_stride[2],
        params.grad_out_stride[2], p.queries - first, p.head_dim);
    const int thread = thread_index();
    if (thread < kBlockM / 2) {
      copy_async_16(
          k_tile + Tiles::kStats + stage * Tiles::kStatBytes + thread * 16,
          workspace.stats +
              (static_cast<int64_t>(batch) * p.heads + next_head) * workspace.padded_queries +
              first + 2 * thread,
          true);
    }
  };

  VisitedTile tile = advance();
  if (tile.exists()) load_queries(tile.index(), 0);
  head = next_head;
  copy_async_commit();

  MatrixReader<D> read_rows = row_reader<D>(lane), read_columns = column_reader<D>(lane);
  MatrixReader<kBlockM> read_scores = column_reader<kBlockM>(lane);
  MatrixReader<kBlockM> read_score_rows = row_reader<kBlockM>(lane);
  const int warp_key = key_warp * kTilesN * 16;
  const int score_warp = column_warp % kScoreWarps;
  uint32_t held[kTilesN][Tiles::kHoldValues ? D / 16 : 1][4];  // the values, as A fragments
  if constexpr (Tiles::kHoldValues) {
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk) {
        load_matrix_x4(held[i][kk], read_rows(v_tile, warp_key + 16 * i, kk));
      }
    }
  }

  float grad_k[kTilesN][kOwnColumns / 8][4] = {}, grad_v[kTilesN][kOwnColumns / 8][4] = {};

  // dQ = dS K of some queries and columns, over all keys of the block.
  const auto add_grad_q = [&](int of_head, int tile, uint32_t score_tile) {
    constexpr int kTilesQ = Tiles::kTilesQ, kColumns = Tiles::kColumnsQ;
    constexpr int kGroups = Tiles::kQueryTiles / kTilesQ;
    const int query_tile = warp % kGroups * kTilesQ;
    const int first_piece = warp / kGroups * (kColumns / 8);
    float sum[kTilesQ][kColumns / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < kBlockN / 32; ++kk) {
      uint32_t a[kTilesQ][2][4];
#pragma unroll
      for (int i = 0; i < kTilesQ; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          load_matrix_x4_transposed(a[i][j],
                                    read_scores(score_tile, kk * 32 + j * 16, query_tile + i));
        }
      }
      constexpr int kStep = kColumns / 8 % 2 == 0 ? 2 : 1;  // so that no mma waits for the last
#pragma unroll
      for (int n = 0; n < kColumns / 8; n += kStep) {
        uint32_t b[kStep][4];
#pragma unroll
        for (int c = 0; c < kStep; ++c) {
          load_matrix_x4_transposed(
              b[c], k_tile + Tile<D>::offset(kk * 32 + lane, first_piece + n + c));
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int c = 0; c < kStep; ++c) {
#pragma unroll
            for (int i = 0; i < kTilesQ; ++i) {
              const uint32_t(&x)[4] = a[i][j];
              mma_16x8x16<T>(sum[i][n + c], x[0], x[1], x[2], x[3], b[c][2 * j], b[c][2 * j + 1]);
            }
          }
        }
      }
    }
    const int64_t first_row =
        (static_cast<int64_t>(batch) * p.heads + of_head) * workspace.padded_queries +
        tile * kBlockM;
#pragma unroll
    for (int i = 0; i < kTilesQ; ++i) {
      const int64_t row_tile = first_row / 16 + query_tile + i;
      float* target = workspace.grad_q + (row_tile * (D / 8) + first_piece) * 128;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) add_fragment(target + n * 128, lane, sum[i][n]);
    }
  };
  // sum += X^T Y: X^T are scores of the warp's keys, `own` those it made, Y some columns of rows.
  const auto add_products = [&](float (&sum)[kTilesN][kOwnColumns / 8][4],
                                const uint32_t (&own)[kTilesN][2 * kTilesM][2],
                                uint32_t score_tile, uint32_t rows) {
#pragma unroll
    for (int t = 0; t < kScoreWarps; ++t) {
      const int from = (score_warp + t) % kScoreWarps;
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        uint32_t a[kTilesN][4];
#pragma unroll
        for (int i = 0; i < kTilesN; ++i) {
          if (t == 0) {
            a[i][0] = own[i][2 * m][0], a[i][1] = own[i][2 * m][1];
            a[i][2] = own[i][2 * m + 1][0], a[i][3] = own[i][2 * m + 1][1];
          } else {
            const int query_tile = from * kTilesM + m;
            load_matrix_x4(a[i], read_score_rows(score_tile, warp_key + 16 * i, query_tile));
          }
        }
#pragma unroll
        for (int d = 0; d < kOwnColumns / 16; ++d) {
          uint32_t b[4];
          load_matrix_x4_transposed(b, read_rows(rows, 16 * (from * kTilesM + m),
                                                 column_warp * (kOwnColumns / 16) + d));
#pragma unroll
          for (int i = 0; i < kTilesN; ++i) {
            mma_16x8x16<T>(sum[i][2 * d], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
            mma_16x8x16<T>(sum[i][2 * d + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
          }
        }
      }
    }
  };

  int last_tile = -1, last_head = 0, stage = 0;
  for (; tile.exists(); stage ^= 1) {
    const uint32_t q_tile = k_tile + Tiles::kStages + stage * 2 * Tiles::kQueryBytes;
    const uint32_t do_tile = q_tile + Tiles::kQueryBytes;
    const uint32_t stats = k_tile + Tiles::kStats + stage * Tiles::kStatBytes;
    const uint32_t scores = k_tile + Tiles::kScores;
    const uint32_t ds_tile = scores + (kExchange ? 1 : stage) * Tiles::kScoreBytes;
    const VisitedTile next = advance();
    read_rows.forget();
    read_columns.forget();
    read_scores.forget();
    read_score_rows.forget();
    copy_async_wait<0>();
    __syncthreads();  // the queries and the last dS are there, and the other stage is free
    if (next.exists()) load_queries(next.index(), stage ^ 1);
    copy_async_commit();
    if (!kExchange && last_tile >= 0 && !params.deterministic) {
      add_grad_q(last_head, last_tile, scores + (stage ^ 1) * Tiles::kScoreBytes);
    }

    // Worked out again: registers are short.
    const int warp = thread_index() / 32, column_warp = warp / kKeyWarps;
    const int warp_key = warp % kKeyWarps * (16 * kTilesN);
    const int warp_query = column_warp % kScoreWarps * (16 * kTilesM);

    // S^T = K Q^T.
    float s[kTilesN][2 * kTilesM][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a[kTilesN][4];
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
        load_matrix_x4(a[i], read_rows(k_tile, warp_key + 16 * i, kk));
      }
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        uint32_t b[4];
        load_matrix_x4(b, read_columns(q_tile, warp_query + 16 * m, kk));
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
        for (int m = 0; m < 2 * kTilesM; ++m) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][m][e] = scale.bend(s[i][m][e]);
        }
      }
    }
    if (tile.partial()) {
      mask_scores_transposed<16 * kTilesM>(s, p, batch, head, tile.index() * kBlockM + warp_query,
                                           first_key + warp_key);
    }
    const auto read_stats = [&](int m, RowStats& first, RowStats& second) {
      const uint4 words =
          load_shared_16(stats + (warp_query + m * 8 + quad * 2) * sizeof(RowStats));
      first = {__uint_as_float(words.x), __uint_as_float(words.y)};
      second = {__uint_as_float(words.z), __uint_as_float(words.w)};
    };

    // dP^T = V dO^T, and meanwhile P^T = exp(S^T - lse), rounded at once: fp32 copies would not fit
    // into the registers.
    uint32_t pt[kTilesN][2 * kTilesM][2];  // of rows group_row and group_row + 8
    float dp[kTilesN][2 * kTilesM][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a[kTilesN][4];
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
        if constexpr (Tiles::kHoldValues) {
#pragma unroll
          for (int j = 0; j < 4; ++j) a[i][j] = held[i][kk][j];
        } else {
          load_matrix_x4(a[i], read_rows(v_tile, warp_key + 16 * i, kk));
        }
      }
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        uint32_t b[4];
        load_matrix_x4(b, read_columns(do_tile, warp_query + 16 * m, kk));
#pragma unroll
        for (int i = 0; i < kTilesN; ++i) {
          mma_16x8x16<T>(dp[i][2 * m], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
          mma_16x8x16<T>(dp[i][2 * m + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
        }
      }
      constexpr int kEvery = D / 16 / (2 * kTilesM);
      if (kk % kEvery == 0 && kk / kEvery < 2 * kTilesM) {
        const int m = kk / kEvery;
        RowStats first, second;
        read_stats(m, first, second);
#pragma unroll
        for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            pt[i][m][j] = pack<T>(exp2_fast(fmaf(s[i][m][2 * j], scale.factor, -first.lse)),
                                  exp2_fast(fmaf(s[i][m][2 * j + 1], scale.factor, -second.lse)));
          }
        }
      }
    }

    // dS^T = P^T (dP^T - delta), times the softcap's slope.
    if (scale.outer != 0.f) {
#pragma unroll
      for (int m = 0; m < 2 * kTilesM; ++m) {
        RowStats row[2];
        read_stats(m, row[0], row[1]);
#pragma unroll
        for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float2 pair = unpack<T>(pt[i][m][e / 2]);
            const float slope = scale.slope(e % 2 ? pair.y : pair.x, row[e % 2].lse);
            dp[i][m][e] = row[e % 2].delta + (dp[i][m][e] - row[e % 2].delta) * slope;
          }
        }
      }
    }
    uint32_t dst[kTilesN][2 * kTilesM][2];
#pragma unroll
    for (int m = 0; m < 2 * kTilesM; ++m) {
      RowStats first, second;
      read_stats(m, first, second);
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float2 probability = unpack<T>(pt[i][m][j]);
          dst[i][m][j] = pack<T>(probability.x * (dp[i][m][2 * j] - first.delta),
                                 probability.y * (dp[i][m][2 * j + 1] - second.delta));
          const uint32_t offset =
              Tile<kBlockM>::offset(warp_key + i * 16 + j * 8 + group_row, warp_query / 8 + m) +
              quad * 4;
          if (kExchange) store_shared_4(scores + offset, pt[i][m][j]);
          if (kExchange || column_warp == 0) store_shared_4(ds_tile + offset, dst[i][m][j]);
        }
      }
    }
    if constexpr (kExchange) __syncthreads();  // the scores of all warps are there

    // dV += P^T dO and dK += dS^T Q.
    add_products(grad_v, pt, scores, do_tile);
    add_products(grad_k, dst, ds_tile, q_tile);
    if (kExchange && !params.deterministic) add_grad_q(head, tile.index(), ds_tile);
    last_tile = tile.index();
    last_head = head;
    tile = next;
    head = next_head;
  }
  if (!kExchange && last_tile >= 0 && !params.deterministic) {
    __syncthreads();
    add_grad_q(last_head, last_tile,
               k_tile + Tiles::kScores + (stage ^ 1) * Tiles::kScoreBytes);
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
        const int column = column_warp * kOwnColumns + d * 8 + quad * 2;
        if (column_warp * kOwnColumns + d * 8 >= p.head_dim) break;
        const float *dk = &grad_k[i][d][2 * j], *dv = &grad_v[i][d][2 * j];
        *reinterpret_cast<uint32_t*>(grad_k_rows + row * params.grad_k_stride[2] + column) =
            pack<T>(dk[0] * factor, dk[1] * factor);
        *reinterpret_cast<uint32_t*>(grad_v_rows + row * params.grad_v_stride[2] + column) =
            pack<T>(dv[0], dv[1]);
      }
    }
  }
}

template <typename T, typename Tiles>
void launch_flash_backward_keys(const FlashAttentionBackwardParams& p,
                                const FlashBackwardWorkspace& workspace, cudaStream_t stream) {
  const auto kernel = flash_backward_kernel<T, Tiles>;
  allow_shared_memory(kernel, Tiles::kShared);
  const FlashAttentionParams& f = p.forward;
  const Schedule schedule = Schedule::make(static_cast<int64_t>(f.batch) * f.kv_heads,
                                           (f.keys + Tiles::kBlockN - 1) / Tiles::kBlockN, 1,
                                           int64_t{8} * f.queries * Tiles::D, 1);
  kernel<<<schedule.blocks(), Tiles::kThreads, Tiles::kShared, stream>>>(p, workspace,
                                                                         ScoreScale(f), schedule);
  TTF_CUDA_CHECK(cudaGetLastError());
}

template <typename T, int D>
void launch_flash_backward(const FlashAttentionBackwardParams& p,
                           const FlashBackwardWorkspace& workspace, cudaStream_t stream) {
  constexpr bool kHasLarge = D == 128;
  if (kHasLarge && device_properties().max_shared_per_block >= BackwardTiles<D, true>::kShared) {
    launch_flash_backward_keys<T, BackwardTiles<D, kHasLarge>>(p, workspace, stream);
  } else {
    launch_flash_backward_keys<T, BackwardTiles<D, false>>(p, workspace, stream);
  }
  if (p.deterministic) launch_flash_backward_q<T, D>(p, workspace, stream);
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
  const auto launch = p.forward.dtype == DType::kFloat16 ? launch_flash_backward<__half, D>
                                                         : launch_flash_backward<__nv_bfloat16, D>;
  launch(p, workspace, stream);
}

}  // namespace torchtune_fused
