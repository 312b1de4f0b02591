// Attention of many queries with mma, for 8.0 and up (Dao, FlashAttention-2, 2023).
//
// Grid: a block for each tile of kBlockM queries of each head, in the order of flash_schedule.h.
// Block: kWarps warps, each with fragments of 16 queries, kStride apart. Tiles of kBlockN keys and
// of their values stream through shared memory (cp.async); scores, probabilities and sums never
// leave registers. Two blocks an SM, registers and 99 KB permitting, fill each other's gaps.
//
// D 64: the queries are held in registers, so that scores can be made 16 keys at a time and run
// into the products with values without a break; keys and values have two buffers each.
// Else: the queries stay in shared memory and a tile's scores are made at once; keys and values
// have one buffer each, values come while scores are made and the next keys while the output is.
// Shared memory: queries [kBlockM, D] (the output passes through them in the end), then keys and
// values [kBlockN, D], once or twice.
//
// A row's base, which is subtracted in the exponent, is the maximum of the first scores that the
// row sees. bf16 has the exponents of fp32, so there larger scores later do no harm, and their
// maxima are not looked for: the sums tell when a base must move, long before they overflow. Where
// scores jump so far within one tile that values times probabilities may have overflowed, the block
// starts again and looks at the maxima of all tiles, as fp16 always does.
#pragma once

#include <type_traits>

#include "attention/flash_mask.cuh"
#include "attention/flash_schedule.h"
#include "attention/flash_tiles.cuh"
#include "common/launch.h"

namespace torchtune_fused {

constexpr float kLargeSum = 0x1p20f;    // of a row whose base must move
constexpr float kSpoiledSum = 0x1p40f;  // of one whose output may have overflowed

template <typename T, int D, int kBlockM, int kBlockN, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 2)
    flash_forward_kernel(const __grid_constant__ FlashAttentionParams p,
                         const __grid_constant__ ScoreScale scale,
                         const __grid_constant__ Schedule schedule) {
  constexpr int kThreads = 32 * kWarps;
  constexpr int kTilesM = kBlockM / kWarps / 16;  // of a warp
  constexpr int kStride = 16 * kWarps;
  constexpr bool kHoldQueries = D == 64;
  constexpr bool kWatchSums = std::is_same_v<T, __nv_bfloat16>;
  constexpr uint32_t kTileBytes = kBlockN * D * 2;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;

  // Worked out again wherever it is needed: registers are short.
  struct Place {
    int batch, head, first_query;
  };
  const auto locate = [&] {
    const int3 block = block_index();
    const int head = block.z * schedule.heads_per_section + block.x;
    return Place{head / p.heads, head % p.heads, (schedule.tiles - 1 - block.y) * kBlockM};
  };
  const Place here = locate();
  if (here.batch >= p.batch) return;
  const int length = filled_keys(p);
  const T* q = static_cast<const T*>(p.q) + here.batch * p.q_stride[0] +
               here.head * p.q_stride[1] + here.first_query * p.q_stride[2];
  const uint32_t q_tile = shared_address(shared), k_tiles = q_tile + kBlockM * D * 2;
  load_tile<kBlockM, D, kThreads>(q_tile, q, p.q_stride[2], p.queries - here.first_query,
                                  p.head_dim);
  const int kv_head = here.head / (p.heads / p.kv_heads);
  const T* k = static_cast<const T*>(p.k) + here.batch * p.k_stride[0] + kv_head * p.k_stride[1];
  const T* v = static_cast<const T*>(p.v) + here.batch * p.v_stride[0] + kv_head * p.v_stride[1];

  const auto load_keys = [&](int tile, uint32_t stage) {
    load_tile<kBlockN, D, kThreads>(k_tiles + stage, k + tile * kBlockN * p.k_stride[2],
                                    p.k_stride[2], length - tile * kBlockN, p.head_dim);
  };
  const auto load_values = [&](int tile, uint32_t stage) {
    load_tile<kBlockN, D, kThreads>(k_tiles + kTileBytes + stage,
                                    v + tile * kBlockN * p.v_stride[2], p.v_stride[2],
                                    length - tile * kBlockN, p.head_dim);
  };

  MatrixReader<D> read_qv = row_reader<D>(lane), read_k = column_reader<D>(lane);
  float out[kTilesM][D / 8][4];
  // Of this lane's rows (2 i + j: row group_row + 8 j of the warp's fragment i): the base, at first
  // below all scores, and the sum over this lane's keys.
  float base[2 * kTilesM], sum[2 * kTilesM];
  uint32_t held[kTilesM][D / 16][4];  // the queries, as A fragments, if kHoldQueries

  // Each of the following works on the warp's fragments from `first` on, an integral constant, and
  // on as many keys of the tile as s has room for.

  // s = Q K^T.
  const auto make_scores = [&](auto first, auto& s, uint32_t k_tile, int key) {
    constexpr int kFirst = decltype(first)::value;
    constexpr int kKeys = sizeof(s[0]) / sizeof(s[0][0]) * 8;
    const int own_row = thread_index() / 32 * 16;
#pragma unroll
    for (int i = kFirst; i < kTilesM; ++i) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) s[i][n][j] = 0.f;
      }
    }
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int i = kFirst; i < kTilesM; ++i) {
        if constexpr (kHoldQueries) {
#pragma unroll
          for (int j = 0; j < 4; ++j) a[i][j] = held[i][kk][j];
        } else {
          load_matrix_x4(a[i], read_qv(q_tile, own_row + i * kStride, kk));
        }
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        load_matrix_x4(b, read_k(k_tile, key + 16 * n, kk));
#pragma unroll
        for (int i = kFirst; i < kTilesM; ++i) {
          mma_16x8x16<T>(s[i][2 * n], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
          mma_16x8x16<T>(s[i][2 * n + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
        }
      }
    }
  };

  // What only some tiles need before the exponentials: softcap, mask, another base.
  const auto prepare_scores = [&](auto first, auto& s, VisitedTile tile, bool look) {
    constexpr int kFirst = decltype(first)::value;
    if (scale.bent) {
#pragma unroll
      for (int i = kFirst; i < kTilesM; ++i) {
#pragma unroll
        for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) s[i][n][j] = scale.bend(s[i][n][j]);
        }
      }
    }
    if (tile.partial()) {
      const Place here = locate();
      mask_scores<kFirst, kBlockN>(s, p, here.batch, here.head, length,
                                  here.first_query + thread_index() / 32 * 16, kStride,
                                  tile.index() * kBlockN);
    }
    if (!look) return;
    // A base moves only when a score has outgrown it by 2^8, so that the output is seldom
    // multiplied. Until then a lane looks at its own scores alone.
    float maximum[2 * kTilesM];
    bool grown = false;
#pragma unroll
    for (int r = 2 * kFirst; r < 2 * kTilesM; ++r) {
      float m = -INFINITY;
#pragma unroll
      for (int n = 0; n < kBlockN / 8; ++n) {
        m = fmaxf(m, fmaxf(s[r / 2][n][r % 2 * 2], s[r / 2][n][r % 2 * 2 + 1]));
      }
      maximum[r] = m * scale.factor;
      if (kWatchSums && sum[r] >= kLargeSum) maximum[r] = fmaxf(maximum[r], base[r] + 20.f);
      grown |= maximum[r] > base[r] + 8.f;
    }
    if (!__any_sync(~0u, grown)) return;
#pragma unroll
    for (int r = 2 * kFirst; r < 2 * kTilesM; ++r) {
      float m = fmaxf(maximum[r], __shfl_xor_sync(~0u, maximum[r], 1));
      m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
      const float new_base = fmaxf(base[r], m);
      const float decay = exp2_fast(base[r] - new_base);
      base[r] = new_base;
      sum[r] = !kWatchSums || sum[r] < kSpoiledSum ? sum[r] * decay : INFINITY;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        out[r / 2][d][r % 2 * 2] *= decay;
        out[r / 2][d][r % 2 * 2 + 1] *= decay;
      }
    }
  };

  // out += P V, 16 keys at a time: their exponentials overlap the products of those before.
  const auto add_values = [&](auto first, auto& s, uint32_t v_tile, int key) {
    constexpr int kFirst = decltype(first)::value;
    constexpr int kKeys = sizeof(s[0]) / sizeof(s[0][0]) * 8;
#pragma unroll
    for (int kk = 0; kk < kKeys / 16; ++kk) {
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int i = kFirst; i < kTilesM; ++i) {
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
        load_matrix_x4_transposed(b, read_qv(v_tile, key + 16 * kk, d));
#pragma unroll
        for (int i = kFirst; i < kTilesM; ++i) {
          mma_16x8x16<T>(out[i][2 * d], a[i][0], a[i][1], a[i][2], a[i][3], b[0], b[1]);
          mma_16x8x16<T>(out[i][2 * d + 1], a[i][0], a[i][1], a[i][2], a[i][3], b[2], b[3]);
        }
      }
    }
  };

  const auto spoiled = [&] {
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2 * kTilesM; ++r) any |= !(sum[r] < kSpoiledSum);
    return any;
  };
  bool always_look = !kWatchSums;  // for maxima
  do {
    const auto kind_of = [&](int tile) {
      const Place here = locate();
      const Range rows = {here.first_query, min(here.first_query + kBlockM, p.queries)};
      const Range keys = {tile * kBlockN, (tile + 1) * kBlockN};
      return kind_of_keys(p, here.batch, here.head, rows, keys, length);
    };
    const auto keys_of_row = [&](int row) {
      const Place here = locate();
      return keys_of_query(p, here.batch, min(here.first_query + row, p.queries - 1), length);
    };
    const auto tiles_until = [](int key) { return (key + kBlockN - 1) / kBlockN; };
    TileWalk walk(keys_of_row(0).begin / kBlockN, tiles_until(keys_of_row(kBlockM - 1).end),
                  kind_of);
    VisitedTile tile = walk.next();
    uint32_t stage = 0;
    if (tile.exists()) {
      load_keys(tile.index(), stage);
      if (kHoldQueries) load_values(tile.index(), stage);
    }
    copy_async_commit();
#pragma unroll
    for (int r = 0; r < 2 * kTilesM; ++r) {
      base[r] = -1e30f;
      sum[r] = 0.f;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) out[r / 2][d][r % 2 * 2] = out[r / 2][d][r % 2 * 2 + 1] = 0.f;
    }
    if constexpr (kHoldQueries) {
      copy_async_wait<0>();
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk) {
          load_matrix_x4(held[i][kk], read_qv(q_tile, warp_row + i * kStride, kk));
        }
      }
    }

    bool look = true;  // at the next tile: a row has no base yet, or must move it
    const auto visit = [&](auto first) {
      constexpr int kFirst = decltype(first)::value;
      forget(k);
      read_qv.forget();
      read_k.forget();
      const bool plain = kFirst == 0 && kWatchSums && !(tile.partial() || look || scale.bent);
      VisitedTile next;
      copy_async_wait<0>();
      __syncthreads();  // the tile is there, and nobody needs the last one any more
      if constexpr (kHoldQueries) {
        next = walk.next();
        if (next.exists()) {
          load_keys(next.index(), stage ^ 2 * kTileBytes);
          load_values(next.index(), stage ^ 2 * kTileBytes);
        }
        copy_async_commit();
        const uint32_t k_tile = k_tiles + stage, v_tile = k_tile + kTileBytes;
        if (plain) {
#pragma unroll
          for (int key = 0; key < kBlockN; key += 16) {
            float s[kTilesM][2][4];
            make_scores(first, s, k_tile, key);
            add_values(first, s, v_tile, key);
          }
        } else {
          float s[kTilesM][kBlockN / 8][4];
          make_scores(first, s, k_tile, 0);
          prepare_scores(first, s, tile, look);
          add_values(first, s, v_tile, 0);
        }
        stage ^= 2 * kTileBytes;
      } else {
        load_values(tile.index(), 0);
        copy_async_commit();
        float s[kTilesM][kBlockN / 8][4];
        make_scores(first, s, k_tiles, 0);
        if (!plain) prepare_scores(first, s, tile, look);
        copy_async_wait<0>();
        __syncthreads();  // the values are there, and nobody needs the keys any more
        next = walk.next();
        if (next.exists()) load_keys(next.index(), 0);
        copy_async_commit();
        add_values(first, s, k_tiles + kTileBytes, 0);
      }
      look = always_look;
#pragma unroll
      for (int r = 2 * kFirst; r < 2 * kTilesM; ++r) look |= !(sum[r] > 0.f && sum[r] < kLargeSum);
      look = __any_sync(~0u, look);
      tile = next;
    };
    if constexpr (kTilesM > 1) {
      // Tiles from here on are hidden from all fragments but the last: half of a causal diagonal.
      const int late = tiles_until(keys_of_row((kTilesM - 1) * kStride - 1).end);
      while (tile.exists() && tile.index() < late) visit(std::integral_constant<int, 0>());
    }
    while (tile.exists()) visit(std::integral_constant<int, kTilesM - 1>());
    copy_async_wait<0>();  // for the queries, where no tile was visited
    always_look = __syncthreads_or(spoiled()) && !always_look;
  } while (kWatchSums && always_look);

  // The warp's rows go out through its part of the queries' tile, as whole lines.
  const int group_row = thread_index() % 32 / 4, quad = thread_index() % 4;
  const int own_row = thread_index() / 32 * 16;
  const auto [batch, head, first_query] = locate();
  const int queries = p.queries - first_query;
  float* lse = p.lse + (static_cast<int64_t>(batch) * p.heads + head) * p.queries + first_query;
  float inverse[2 * kTilesM];
#pragma unroll
  for (int r = 0; r < 2 * kTilesM; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    inverse[r] = sum[r] > 0.f ? __fdividef(1.f, sum[r]) : 0.f;
    const int row = own_row + r / 2 * kStride + r % 2 * 8 + group_row;
    if (quad == 0 && row < queries) {
      lse[row] = sum[r] > 0.f ? (base[r] + __log2f(sum[r])) * kLn2 : 0.f;
    }
  }
#pragma unroll
  for (int d = 0; d < D / 8; ++d) {
    const uint32_t at = q_tile + Tile<D>::offset(own_row + group_row, d) + quad * 4;
#pragma unroll
    for (int r = 0; r < 2 * kTilesM; ++r) {
      const float* pair = &out[r / 2][d][r % 2 * 2];
      store_shared_4(at + (r / 2 * kStride + r % 2 * 8) * Tile<D>::kRowBytes,
                     pack<T>(pair[0] * inverse[r], pair[1] * inverse[r]));
    }
  }
  __syncwarp();
  T* target = static_cast<T*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] +
              first_query * p.out_stride[2];
#pragma unroll
  for (int i = 0; i < kTilesM; ++i) {
    store_rows<16, D>(target, p.out_stride[2], q_tile, own_row + i * kStride, queries, p.head_dim);
  }
}

template <typename T, int D, int kBlockM, int kBlockN, int kWarps>
void launch_flash_forward_tiles(const FlashAttentionParams& p, cudaStream_t stream) {
  const auto kernel = flash_forward_kernel<T, D, kBlockM, kBlockN, kWarps>;
  constexpr int kBytes = (kBlockM + (D == 64 ? 4 : 2) * kBlockN) * D * 2;
  allow_shared_memory(kernel, kBytes);
  const Schedule schedule =
      Schedule::make(static_cast<int64_t>(p.batch) * p.heads, (p.queries + kBlockM - 1) / kBlockM,
                     p.heads / p.kv_heads, int64_t{4} * p.keys * D * p.kv_heads / p.heads, 2);
  kernel<<<schedule.grid(), 32 * kWarps, kBytes, stream>>>(p, ScoreScale(p), schedule);
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
