// What low-rank adapters need from the gradients of their layers' outputs, read once:
// grad_low = scale * grad b and grad_b = grad^T low, for up to three layers in one launch.
//
// Grid: 512 columns of one layer, by a run of chunks of 64 tokens. A block of 8 warps goes through
// tiles of 64 tokens x 128 columns, 16 columns a warp, in a ring of three copied ahead (cp.async).
// All products have the rank as their 16 rows: grad_low^T = b^T grad^T, whose columns are the
// chunk's tokens, summed over the block's columns; and grad_b^T = low^T grad, whose columns are the
// warp's, summed over the block's tokens. Both leave as partial sums in fp32, for a second kernel
// to add up in a fixed order.
//
// Memory: grad [rows, n], b [n, rank], row-major; of all layers side by side low and grad_low,
// [rows, ranks]. Partial sums of grad_low [column block][chunk][16][64], of grad_b
// [token block][n / 16][16][16].
#pragma once

#include "adapter/adapter.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace torchtune_fused {

constexpr int kAdapterThreads = 256, kAdapterWarps = kAdapterThreads / 32;
constexpr int kTileColumns = 128, kTiles = kAdapterColumns / kTileColumns;
constexpr int kTileBytes = kChunk * kTileColumns * 2, kAdapterStages = 3;
constexpr int kLowBytes = kChunk * kAdapterRank * 2;
constexpr int kSumRow = kChunk + 8;  // floats, so that the rows of a fragment lie in other banks
constexpr int kAdapterSharedBytes =
    kAdapterStages * kTileBytes + 2 * kLowBytes + kAdapterWarps * kAdapterRank * kSumRow * 4;

template <typename T>
__global__ void __launch_bounds__(kAdapterThreads, 2)
    adapter_backward_kernel(const __grid_constant__ AdapterBackwardParams p) {
  wait_for_grid();
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t tiles = shared_address(shared), lows = tiles + kAdapterStages * kTileBytes;
  float* sums = reinterpret_cast<float*>(shared + kAdapterStages * kTileBytes + 2 * kLowBytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;

  int block = blockIdx.x, l = 0;
  while (block >= p.layers[l].column_blocks) block -= p.layers[l++].column_blocks;
  const AdapterLayer& layer = p.layers[l];
  const T* grad = static_cast<const T*>(layer.grad);
  const T* low = static_cast<const T*>(p.low) + layer.start;
  const int first_column = block * kAdapterColumns;
  const int first_chunk = blockIdx.y * p.chunks_per_block;
  const int steps = kTiles * min(p.chunks_per_block, p.chunks - first_chunk);

  const auto load = [&](int step) {
    if (step < steps) {
      const int first_row = (first_chunk + step / kTiles) * kChunk;
      const uint32_t tile = tiles + step % kAdapterStages * kTileBytes;
#pragma unroll
      for (int i = 0; i < kTileBytes / 16 / kAdapterThreads; ++i) {
        const int row = i * (kAdapterThreads / 16) + threadIdx.x / 16, piece = threadIdx.x % 16;
        const int column = first_column + step % kTiles * kTileColumns + piece * 8;
        const bool valid = first_row + row < p.rows && column < layer.n;
        copy_async_16(tile + row * kTileColumns * 2 + (piece ^ row % 8) * 16,
                      valid ? grad + int64_t(first_row + row) * layer.n + column : grad, valid);
      }
      if (step % kTiles == 0 && threadIdx.x < kLowBytes / 16) {
        const int row = threadIdx.x / 2, piece = threadIdx.x % 2;
        const bool valid = first_row + row < p.rows && piece * 8 < layer.rank;
        copy_async_16(lows + step / kTiles % 2 * kLowBytes + row * kAdapterRank * 2 + piece * 16,
                      valid ? low + int64_t(first_row + row) * p.ranks + piece * 8 : low, valid);
      }
    }
    copy_async_commit();
  };
#pragma unroll
  for (int step = 0; step < kAdapterStages - 1; ++step) load(step);

  // b^T of this warp's columns, as the first operand of mma.
  uint32_t b_rows[kTiles][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = g + i % 2 * 8;
      const int column = first_column + t * kTileColumns + warp * 16 + 2 * q + i / 2 * 8;
      const T* at = static_cast<const T*>(layer.b) + int64_t(column) * layer.rank + r;
      const bool valid = r < layer.rank && column < layer.n;  // n is even
      b_rows[t][i] = valid ? pack<T>(float(at[0]), float(at[layer.rank])) : 0;
    }
  }

  float low_sum[kChunk / 8][4] = {}, b_sum[kTiles][2][4] = {};
  uint32_t low_rows[kChunk / 16][4];
  // Where ldmatrix finds this lane's row of 8 elements: 16 tokens by 16 columns.
  const int matrix_row = lane / 16 * 8 + lane % 8, matrix_piece = lane / 8 % 2;

  for (int first = 0; first < steps; first += kTiles) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int step = first + t;
      copy_async_wait<kAdapterStages - 2>();
      __syncthreads();
      load(step + kAdapterStages - 1);
      if (t == 0) {
        const uint32_t own = lows + step / kTiles % 2 * kLowBytes;
#pragma unroll
        for (int i = 0; i < kChunk / 16; ++i) {
          load_matrix_x4_transposed(
              low_rows[i], own + (16 * i + matrix_row) * kAdapterRank * 2 + matrix_piece * 16);
        }
      }
      const uint32_t tile = tiles + step % kAdapterStages * kTileBytes;
#pragma unroll
      for (int i = 0; i < kChunk / 16; ++i) {
        const int row = 16 * i + matrix_row;
        const uint32_t at =
            tile + row * kTileColumns * 2 + ((2 * warp + matrix_piece) ^ row % 8) * 16;
        uint32_t x[4];
        load_matrix_x4(x, at);
        const auto& b = b_rows[t];
        mma_16x8x16<T>(low_sum[2 * i], b[0], b[1], b[2], b[3], x[0], x[1]);
        mma_16x8x16<T>(low_sum[2 * i + 1], b[0], b[1], b[2], b[3], x[2], x[3]);
        load_matrix_x4_transposed(x, at);
        const auto& a = low_rows[i];
        mma_16x8x16<T>(b_sum[t][0], a[0], a[1], a[2], a[3], x[0], x[2]);
        mma_16x8x16<T>(b_sum[t][1], a[0], a[1], a[2], a[3], x[1], x[3]);
      }
    }
    // Over the warps' columns. The next writes to `sums` are barriers away.
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        float* at = sums + (warp * kAdapterRank + g + i / 2 * 8) * kSumRow + 8 * j + 2 * q;
        *reinterpret_cast<float2*>(at) = make_float2(low_sum[j][i], low_sum[j][i + 1]);
        low_sum[j][i] = low_sum[j][i + 1] = 0.f;
      }
    }
    __syncthreads();
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    const int r = threadIdx.x / 16, token = threadIdx.x % 16 * 4;
#pragma unroll
    for (int w = 0; w < kAdapterWarps; ++w) {
      const float4 v =
          *reinterpret_cast<const float4*>(sums + (w * kAdapterRank + r) * kSumRow + token);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    float* to = p.partial + layer.low_partial +
                (int64_t(block) * p.chunks + first_chunk + first / kTiles) * kAdapterRank * kChunk;
    *reinterpret_cast<float4*>(to + r * kChunk + token) = sum;
  }

#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    const int group = (first_column + t * kTileColumns) / 16 + warp;
    float* to = p.partial + layer.b_partial +
                (int64_t(blockIdx.y) * layer.column_blocks * (kAdapterColumns / 16) + group) * 256;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        *reinterpret_cast<float2*>(to + (g + i / 2 * 8) * 16 + 8 * j + 2 * q) =
            make_float2(b_sum[t][j][i], b_sum[t][j][i + 1]);
      }
    }
  }
}

// Adds `parts` pairs of partial sums, in their order; as many loads at a time as there may be.
__device__ __forceinline__ void add_up(float& x, float& y, const float* from, int64_t next_part,
                                       int to_second, int parts) {
  constexpr int kAtOnce = 16;
  for (int part = 0; part < parts; part += kAtOnce) {
    float first[kAtOnce], second[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float* at = from + (part + i) * next_part;
      first[i] = part + i < parts ? at[0] : 0.f;
      second[i] = part + i < parts ? at[to_second] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x += first[i], y += second[i];
  }
}

// Adds up the partial sums: a thread for two ranks of a token, or of a row of b.
template <typename T>
__global__ void __launch_bounds__(kAdapterThreads)
    adapter_finish_kernel(const __grid_constant__ AdapterBackwardParams p) {
  wait_for_grid();
  int i = blockIdx.x * kAdapterThreads + threadIdx.x;
  const int tokens = p.chunks * kChunk;
  for (int l = 0; l < p.count; ++l) {
    const AdapterLayer& layer = p.layers[l];
    const int columns = layer.column_blocks * kAdapterColumns;
    float x = 0.f, y = 0.f;
    if (i < tokens * (kAdapterRank / 2)) {
      const int token = i / (kChunk * 8) * kChunk + i % kChunk, r = i / kChunk % 8 * 2;
      const float* from = p.partial + layer.low_partial +
                          int64_t(token / kChunk) * kAdapterRank * kChunk + r * kChunk +
                          token % kChunk;
      add_up(x, y, from, int64_t(p.chunks) * kAdapterRank * kChunk, kChunk, layer.column_blocks);
      if (token < p.rows && r < layer.rank) {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(p.grad_low) + int64_t(token) * p.ranks +
                                     layer.start + r) = pack<T>(x * p.scale, y * p.scale);
      }
      return;
    }
    i -= tokens * (kAdapterRank / 2);
    if (i < columns * (kAdapterRank / 2)) {
      const int column = i / 128 * 16 + i % 16, r = i / 16 % 8 * 2;
      const float* from =
          p.partial + layer.b_partial + int64_t(column / 16) * 256 + r * 16 + column % 16;
      add_up(x, y, from, int64_t(columns) * kAdapterRank, 16, p.token_blocks);
      if (column < layer.n && r < layer.rank) {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(layer.grad_b) + int64_t(column) * layer.rank +
                                     r) = pack<T>(x, y);
      }
      return;
    }
    i -= columns * (kAdapterRank / 2);
  }
}

}  // namespace torchtune_fused
