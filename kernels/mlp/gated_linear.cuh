// hidden = activation(x gate^T) * (x up^T), on Hopper: one product with the activation in its
// epilogue.
//
// Tiles: a block computes kRows rows of kColumns columns of gate and of the same columns of up: the
// second operand of one 128 x 256 product is 128 rows of gate, then 128 of up. So each thread holds
// a sum of gate and that of up for the same element.
// Grid: persistent, clusters of two blocks that lie one below the other. Each loads its rows of x;
// block 0 loads the tile of gate and block 1 that of up, for both (multicast).
// Block: warpgroup 0 loads (one thread), 1 and 2 multiply 64 rows each, over a ring of kStages.
// Memory: x [rows, k], gate and up [n, k], outputs [rows, n], row-major. In shared memory all tiles
// have rows of 64 elements, 128 bytes, in TMA's 128-byte swizzle.
#pragma once

#include "common/activation.cuh"
#include "common/vec.cuh"
#include "mlp/hopper.cuh"
#include "mlp/mlp.h"

namespace torchtune_fused {

struct GatedLinearMaps {
  CUtensorMap x, gate_weight, up_weight;  // boxes of 128 rows and 64 columns
  CUtensorMap hidden, gate, up;           // boxes of 64 rows and 64 columns
};

struct GatedLinearShape {
  int rows, n, k;
  Activation activation;
  bool save;
};

constexpr int kRows = 128, kColumns = 128, kDepth = 64;
constexpr int kStages = 4;
constexpr int kBand = 16;
constexpr int kMinRows = 512;
constexpr int kOperandBytes = 128 * kDepth * 2;
constexpr int kStageBytes = 3 * kOperandBytes;  // x, gate, up
constexpr int kBoxBytes = 64 * 64 * 2;
constexpr int kOutBytes = 2 * 2 * kBoxBytes;  // two boxes for each of the two warpgroups
constexpr int kLinearSharedBytes = 1024 + kStages * kStageBytes + kOutBytes + 2 * kStages * 8;
constexpr int kLinearThreads = 3 * 128;

// The order in which clusters go through the tiles: kBand pairs of row tiles at a time, so that
// these rows of x and the weights in use stay in L2.
struct TileOrder {
  int row_pairs, column_tiles;

  __device__ TileOrder(const GatedLinearShape& s)
      : row_pairs((s.rows + 2 * kRows - 1) / (2 * kRows)),
        column_tiles((s.n + kColumns - 1) / kColumns) {}
  __device__ int size() const { return row_pairs * column_tiles; }
  __device__ void at(int i, int& row_pair, int& column_tile) const {
    const int first = i / (kBand * column_tiles) * kBand;
    const int height = min(kBand, row_pairs - first);
    i -= first * column_tiles;
    row_pair = first + i % height;
    column_tile = i / height;
  }
};

template <typename T>
__global__ void __cluster_dims__(2) __launch_bounds__(kLinearThreads, 1)
    gated_linear_kernel(const __grid_constant__ GatedLinearMaps maps, const GatedLinearShape shape) {
  extern __shared__ uint8_t raw[];
  const uint32_t stages = (shared_address(raw) + 1023) / 1024 * 1024;
  const uint32_t outs = stages + kStages * kStageBytes;
  const uint32_t full = outs + kOutBytes, empty = full + kStages * 8;
  const uint32_t rank = cluster_rank();
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 2 * 8);  // the 8 multiplying warps of both blocks
    }
    barrier_init_fence();
  }
  cluster_sync();

  const TileOrder order(shape);
  const int clusters = gridDim.x / 2, steps = (shape.k + kDepth - 1) / kDepth;
  int stage = 0;
  uint32_t parity = 0;
  const auto advance = [&] {
    if (++stage == kStages) stage = 0, parity ^= 1;
  };

  if (warpgroup == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      const CUtensorMap* weight = rank == 0 ? &maps.gate_weight : &maps.up_weight;
      for (int tile = blockIdx.x / 2; tile < order.size(); tile += clusters) {
        int row_pair, column_tile;
        order.at(tile, row_pair, column_tile);
        const int row = (2 * row_pair + rank) * kRows, column = column_tile * kColumns;
        for (int step = 0; step < steps; ++step, advance()) {
          const uint32_t x = stages + stage * kStageBytes;
          barrier_wait(empty + 8 * stage, parity ^ 1);
          barrier_arrive_expect_bytes(full + 8 * stage, kStageBytes);
          load_tile(x, &maps.x, full + 8 * stage, step * kDepth, row);
          load_tile_multicast(x + (1 + rank) * kOperandBytes, weight, full + 8 * stage,
                              step * kDepth, column, 0b11);
        }
      }
    }
  } else {
    take_registers<232>();
    const int half = warpgroup - 1, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const uint32_t out = outs + half * 2 * kBoxBytes;
    // Where this lane's row of eight 16-byte chunks lies in a box, for stmatrix.
    const int box_row = 16 * warp + lane % 16;
    const auto release = [&](int s) {
      if (lane < 2) barrier_arrive_at(empty + 8 * s, lane);
    };
    float sum[128];
    int box = 0;

    for (int tile = blockIdx.x / 2; tile < order.size(); tile += clusters) {
      int previous = 0;
      for (int step = 0; step < steps; ++step, advance()) {
        const uint32_t x = stages + stage * kStageBytes + half * (kOperandBytes / 2);
        const uint32_t weights = stages + stage * kStageBytes + kOperandBytes;
        barrier_wait(full + 8 * stage, parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
          wgmma_64x256x16<T>(sum, wgmma_operand(x + 32 * k), wgmma_operand(weights + 32 * k),
                             step > 0 || k > 0);
        }
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          release(previous);
        }
        previous = stage;
      }
      wgmma_wait<0>();
      wgmma_fence_sums(sum);
      release(previous);

      int row_pair, column_tile;
      order.at(tile, row_pair, column_tile);
      const int row = (2 * row_pair + rank) * kRows + half * 64, column = column_tile * kColumns;
      // Sends 64 columns of this warpgroup's rows to memory, by way of two boxes in turns.
      const auto store = [&](const CUtensorMap* map, int columns, auto value) {
        const uint32_t to = out + box * kBoxBytes;
        if (threadIdx.x % 128 == 0) store_tiles_wait_read<1>();
        named_sync<128>(1 + half);
#pragma unroll
        for (int chunk = 0; chunk < 8; chunk += 2) {
          uint32_t r[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = 4 * (columns / 8 + chunk + i / 2) + 2 * (i % 2);
            r[i] = pack<T>(value(at), value(at + 1));
          }
          const int here = (chunk + lane / 16) ^ (box_row % 8);
          store_matrix_x4(to + box_row * 128 + here * 16, r);
        }
        fence_shared_for_tma();
        named_sync<128>(1 + half);
        if (threadIdx.x % 128 == 0) {
          store_tile(map, to, column + columns, row);
          store_tiles_commit();
        }
        box ^= 1;
      };
      if (shape.save) {
#pragma unroll
        for (int columns = 0; columns < kColumns; columns += 64) {
          store(&maps.gate, columns, [&](int i) { return sum[i]; });
          store(&maps.up, columns, [&](int i) { return sum[64 + i]; });
        }
      }
      with_activation(shape.activation, [&](auto activation) {
#pragma unroll
        for (int columns = 0; columns < kColumns; columns += 64) {
          store(&maps.hidden, columns,
                [&](int i) { return activate<activation.value>(sum[i]) * sum[64 + i]; });
        }
      });
    }
    if (threadIdx.x % 128 == 0) store_tiles_wait_read<0>();
  }
  cluster_sync();  // the other block may still send to this one's shared memory
}

}  // namespace torchtune_fused
