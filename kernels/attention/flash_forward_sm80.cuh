// Attention of many queries with mma, for 8.0 and up (Dao, FlashAttention-2, 2023).
//
// Grid: a block for each tile of kBlockM queries of each head, in the order of flash_schedule.h.
// Block: kWarps warps of kBlockM / kWarps queries each. The queries stay in shared memory, tiles of
// kBlockN keys and of their values stream through it (cp.async), the values while scores are made
// and the next keys while the output is; scores, probabilities and sums never leave registers.
// Shared memory: queries [kBlockM, D] (the output passes through them in the end), keys and values
// [kBlockN, D]. Two blocks an SM, registers and 99 KB permitting, fill each other's gaps.
#pragma once

#include "attention/flash_mask.cuh"
#include "attention/flash_schedule.h"
#include "attention/flash_tiles.cuh"
#include "common/launch.h"

namespace torchtune_fused {

template <typename T, int D, int kBlockM, int kBlockN, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 2)
    flash_forward_kernel(const __grid_constant__ FlashAttentionParams p,
                         const __grid_constant__ ScoreScale scale,
                         const __grid_constant__ Schedule schedule) {
  constexpr int kThreads = 32 * kWarps;
  constexpr int kTilesM = kBlockM / kWarps / 16;  // of a warp
  constexpr bool kHoldQueries = D == 64;          // in registers: there is room
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // What only masks need is worked out again for them: registers are short.
  struct Place {
    int batch, head, first_query;
  };
  const auto locate = [&] {
    int tile_m, head;
    schedule.locate(block_index(), tile_m, head);
    return Place{head / p.heads, head % p.heads, (schedule.tiles - 1 - tile_m) * kBlockM};
  };
  const auto [batch, head, first_query] = locate();
  const int length = filled_keys(p);
  const int queries = min(kBlockM, p.queries - first_query);
  const T* q = static_cast<const T*>(p.q) + batch * p.q_stride[0] + head * p.q_stride[1] +
               first_query * p.q_stride[2];
  const uint32_t q_tile = shared_address(shared);
  const uint32_t k_tile = q_tile + kBlockM * D * 2, v_tile = k_tile + kBlockN * D * 2;
  load_tile<kBlockM, D, kThreads>(q_tile, q, p.q_stride[2], queries, p.head_dim);
  const int kv_head = head / (p.heads / p.kv_heads);
  const T* k = static_cast<const T*>(p.k) + batch * p.k_stride[0] + kv_head * p.k_stride[1];
  const T* v = static_cast<const T*>(p.v) + batch * p.v_stride[0] + kv_head * p.v_stride[1];

  const auto kind_of = [&](int tile) {
    const auto [batch, head, first_query] = locate();
    const Range rows = {first_query, min(first_query + kBlockM, p.queries)};
    const Range keys = {tile * kBlockN, (tile + 1) * kBlockN};
    return kind_of_keys(p, batch, head, rows, keys, length);
  };
  const int begin = keys_of_query(p, batch, first_query, length).begin / kBlockN;
  const int end = keys_of_query(p, batch, first_query + queries - 1, length).end;
  TileWalk walk(begin, (end + kBlockN - 1) / kBlockN, kind_of);

  const auto load_keys = [&](int tile) {
    load_tile<kBlockN, D, kThreads>(k_tile, k + tile * kBlockN * p.k_stride[2], p.k_stride[2],
                                    length - tile * kBlockN, p.head_dim);
  };
  const auto load_values = [&](int tile) {
    load_tile<kBlockN, D, kThreads>(v_tile, v + tile * kBlockN * p.v_stride[2], p.v_stride[2],
                                    length - tile * kBlockN, p.head_dim);
  };

  VisitedTile tile = walk.next();
  if (tile.exists()) load_keys(tile.index());
  copy_async_commit();

  MatrixReader<D> read_qv = row_reader<D>(lane), read_k = column_reader<D>(lane);
  const int warp_row = warp * kTilesM * 16;
  float out[kTilesM][D / 8][4] = {};
  // Of this lane's rows (2 i + j: row group_row + 8 j of the warp's tile i): what is subtracted in
  // the exponent, close to the maximum of the scores, at first below them all; and the sum over
  // this lane's keys.
  float base[2 * kTilesM], sum[2 * kTilesM];
#pragma unroll
  for (int r = 0; r < 2 * kTilesM; ++r) {
    base[r] = -1e30f;
    sum[r] = 0.f;
  }

  uint32_t held[kTilesM][D / 16][4];  // the queries, as A fragments, where there is room for them
  if constexpr (kHoldQueries) {
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int kk = 0; kk < D / 16; ++kk) {
        load_matrix_x4(held[i][kk], read_qv(q_tile, warp_row + 16 * i, kk));
      }
    }
  }

  while (tile.exists()) {
    forget(k);
    read_qv.forget();
    read_k.forget();
    copy_async_wait<0>();
    __syncthreads();  // the keys are there, and nobody needs the last values any more
    load_values(tile.index());
    copy_async_commit();

    // S = Q K^T.
    const int own_row = thread_index() / 32 * (16 * kTilesM);
    float s[kTilesM][kBlockN / 8][4] = {};
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        if constexpr (kHoldQueries) {
#pragma unroll
          for (int j = 0; j < 4; ++j) a[i][j] = held[i][kk][j];
        } else {
          load_matrix_x4(a[i], read_qv(q_tile, own_row + 16 * i, kk));
        }
      }
#pragma unroll
      for (int n = 0; n < kBlockN / 16; ++n) {
        uint32_t b[4];
        load_matrix_x4(b, read_k(k_tile, 16 * n, kk));
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          mma_16x8x16<T>(s[i][2 * n], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
          mma_16x8x16<T>(s[i][2 * n + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
        }
      }
    }

    if (scale.bent) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) s[i][n][j] = scale.bend(s[i][n][j]);
        }
      }
    }
    if (tile.partial()) {
      mask_scores<kBlockN>(s, p, batch, head, length,
                           first_query + thread_index() / 32 * (16 * kTilesM),
                           tile.index() * kBlockN);
    }

    // The base of a row moves only when the maximum has outgrown it by 2^8: fp32 sums bear that,
    // and the output is seldom multiplied. Until then a lane looks at its own scores alone.
    float maximum[2 * kTilesM];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < 2 * kTilesM; ++r) {
      float m = -INFINITY;
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
        m = fmaxf(m, fmaxf(s[r / 2][n][r % 2 * 2], s[r / 2][n][r % 2 * 2 + 1]));
      }
      maximum[r] = m * scale.factor;
      grown |= maximum[r] > base[r] + 8.f;
    }
    if (__any_sync(~0u, grown)) {
#pragma unroll
      for (int r = 0; r < 2 * kTilesM; ++r) {
        float m = fmaxf(maximum[r], __shfl_xor_sync(~0u, maximum[r], 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        const float new_base = fmaxf(base[r], m);
        const float decay = exp2_fast(base[r] - new_base);
        base[r] = new_base;
        sum[r] *= decay;
#pragma unroll
        for (int d = 0; d < D / 8; ++d) {
          out[r / 2][d][r % 2 * 2] *= decay;
          out[r / 2][d][r % 2 * 2 + 1] *= decay;
        }
      }
    }

    copy_async_wait<0>();
    __syncthreads();  // the values are there, and nobody needs the keys any more
    const VisitedTile next = walk.next();
    if (next.exists()) load_keys(next.index());
    copy_async_commit();

    // out += P V, 16 keys at a time: their exponentials overlap the products of those before.
#pragma unroll
    for (int kk = 0; kk < kBlockN / 16; ++kk) {
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = 2 * i + j % 2;
          const float* pair = &s[i][2 * kk + j / 2][j % 2 * 2];
          const float low = exp2_fast(fmaf(pair[0], scale.factor, -base[r]));
          const float high = exp2_fast(fmaf(pair[1], scale.factor, -base[r]));
          sum[r] += low + high;
          a[i][j] = pack<T>(low, high);
        }
      }
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        load_matrix_x4_transposed(b, read_qv(v_tile, 16 * kk, d));
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          mma_16x8x16<T>(out[i][2 * d], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
          mma_16x8x16<T>(out[i][2 * d + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
        }
      }
    }
    tile = next;
  }
  copy_async_wait<0>();
  __syncthreads();  // for the queries, where no tile was visited

  // The warp's rows go out through its part of the queries' tile, as whole lines.
  const int thread = thread_index(), group_row = thread % 32 / 4, quad = thread % 4;
#pragma unroll
  for (int r = 0; r < 2 * kTilesM; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const int row = warp_row + r / 2 * 16 + r % 2 * 8 + group_row;
    const float inverse = sum[r] > 0.f ? 1.f / sum[r] : 0.f;
    if (quad == 0 && row < queries) {
      p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.queries + first_query + row] =
          sum[r] > 0.f ? base[r] * kLn2 + logf(sum[r]) : 0.f;
    }
#pragma unroll
    for (int d = 0; d < D / 8; ++d) {
      const float* pair = &out[r / 2][d][r % 2 * 2];
      store_shared_4(q_tile + Tile<D>::offset(row, d) + quad * 4,
                     pack<T>(pair[0] * inverse, pair[1] * inverse));
    }
  }
  __syncwarp();
  T* target = static_cast<T*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] +
              first_query * p.out_stride[2];
#pragma unroll
  for (int at = thread % 32; at < kTilesM * 16 * (D / 8); at += 32) {
    const int row = warp_row + at / (D / 8), piece = at % (D / 8);
    if (row < queries && piece * 8 < p.head_dim) {
      *reinterpret_cast<uint4*>(target + row * p.out_stride[2] + piece * 8) =
          load_shared_16(q_tile + Tile<D>::offset(row, piece));
    }
  }
}

template <typename T, int D, int kBlockM, int kBlockN, int kWarps>
void launch_flash_forward_tiles(const FlashAttentionParams& p, cudaStream_t stream) {
  const auto kernel = flash_forward_kernel<T, D, kBlockM, kBlockN, kWarps>;
  constexpr int kBytes = (kBlockM + 2 * kBlockN) * D * 2;
  allow_shared_memory(kernel, kBytes);
  const Schedule schedule =
      Schedule::make(static_cast<int64_t>(p.batch) * p.heads, (p.queries + kBlockM - 1) / kBlockM,
                     p.heads / p.kv_heads, int64_t{4} * p.keys * D * p.kv_heads / p.heads, 2);
  kernel<<<schedule.blocks(), 32 * kWarps, kBytes, stream>>>(p, ScoreScale(p), schedule);
  TTF_CUDA_CHECK(cudaGetLastError());
}

// Instantiated once per padded head dimension, each in a file of its own.
template <int D>
struct FlashForwardSm80 {
  static void launch(const FlashAttentionParams& params, cudaStream_t stream);
};

template <int D>
void FlashForwardSm80<D>::launch(const FlashAttentionParams& p, cudaStream_t stream) {
  constexpr int kBlockM = D == 256 ? 64 : 128;
  const auto launch = p.dtype == DType::kFloat16
                          ? launch_flash_forward_tiles<__half, D, kBlockM, 64, 4>
                          : launch_flash_forward_tiles<__nv_bfloat16, D, kBlockM, 64, 4>;
  launch(p, stream);
}

}  // namespace torchtune_fused
