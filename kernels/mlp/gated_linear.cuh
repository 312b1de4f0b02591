// hidden = activation(x gate^T) * (x up^T), on Hopper: one product with the activation in its
// epilogue, and LoRA adapters as a few more columns of x and of the weights.
//
// Tiles: the second operand of a block's 128 x 256 product is 128 rows of gate, then the same 128 of
// up, so that each thread holds the sums of gate and of up for the same elements. Of a cluster,
// block 0 loads the rows of gate and block 1 those of up.
// Memory: x [rows, k], gate and up [n, k], low [rows, rank], outputs [rows, n], all row-major.
// Grid and shared memory as product.cuh says, with a Handover for each multiplying warpgroup: 64
// columns of gate and the same of up, the left ones first.
#pragma once

#include "common/activation.cuh"
#include "mlp/handover.cuh"

namespace torchtune_fused {

struct GatedLinearMaps {
  CUtensorMap x, gate_weight, up_weight;  // tiles of 128 rows
  CUtensorMap low, low_gate, low_up;      // likewise, the same once more where there are none
  CUtensorMap gate, up;                   // tiles of 64 rows
};

struct GatedLinearShape {
  int rows, n, k;
  int rank, rank_gate;  // of both adapters, and of gate's, which comes first; 0: none
  void* hidden;
  Activation activation;
  bool save;
};

constexpr int kGatedStages = 4, kGatedWidth = kWidth / 2;
constexpr int kGatedSharedBytes = 1024 + Ring<kGatedStages>::kBytes + Handover::kBytes;
// Of a thread, for finishing and for multiplying; before, the 3 warpgroups have 168 each.
constexpr int kGatedFinishingRegisters = 112, kGatedMultiplyingRegisters = 192;

template <typename T>
__global__ void __cluster_dims__(2) __launch_bounds__(kProductThreads, 1)
    gated_linear_kernel(const __grid_constant__ GatedLinearMaps maps,
                        const GatedLinearShape shape) {
  extern __shared__ uint8_t raw[];
  uint8_t* shared = align_1024(raw);
  const uint32_t boxes = shared_address(shared);
  Ring<kGatedStages> ring(shared + 4 * kBoxBytes);
  Barrier* barriers = ring.empty_barriers + kGatedStages;
  const int rank = cluster_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    ring.init_barriers();
    for (int half = 0; half < 2; ++half) Handover(boxes, barriers, half).init_barriers();
    fence_init();
  }
  sync_cluster();
  wait_for_grid();

  const TileOrder order(shape.rows, (shape.n + kGatedWidth - 1) / kGatedWidth);
  const int wide_steps = steps_of(shape.k), steps = wide_steps + steps_of(shape.rank);
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  int row_pair, column;

  if (warp < 4) {
    give_up_registers<kGatedFinishingRegisters>();
    if (warp == 0 && lane == 0) {
      const CUtensorMap* weight = rank == 0 ? &maps.gate_weight : &maps.up_weight;
      const CUtensorMap* low_weight = rank == 0 ? &maps.low_gate : &maps.low_up;
      // Outside of a matrix are zeros: the columns of low that are the other adapter's.
      const int low_start = rank == 0 ? 0 : shape.rank_gate;
      for (int tile = cluster; tile < order.size(); tile += clusters) {
        order.at(tile, row_pair, column);
        for (int step = 0; step < steps; ++step, ring.advance()) {
          const bool wide = step < wide_steps;
          const int depth = (wide ? step : step - wide_steps) * kDepth;
          wait(ring.empty(), ring.parity ^ 1);
          arrive_and_expect(ring.full(), kStageBytes);
          load_tile(ring.first(), wide ? &maps.x : &maps.low, ring.full(), depth,
                    (2 * row_pair + rank) * kRows);
          load_tile_multicast(ring.second() + rank * kSecondBytes / 2, wide ? weight : low_weight,
                              ring.full(), wide ? depth : depth - low_start,
                              column * kGatedWidth, 0b11);
        }
      }
    } else if (warp > 0) {
      const bool elected = warp == 1 && lane == 0 && shape.save;
      const int64_t row_bytes = int64_t{2} * shape.n;
      with_activation(shape.activation, [&](auto activation) {
        for (int tile = cluster; tile < order.size(); tile += clusters) {
          order.at(tile, row_pair, column);
#pragma unroll 1
          for (int i = 0; i < 4; ++i) {
            const bool right = i >= 2;
            const Handover sums(boxes, barriers, i % 2);
            const int first_row = (2 * row_pair + rank) * kRows + 64 * (i % 2);
            const int first = column * kGatedWidth + 64 * right, own = first + lane % 8 * 8;
            const int rows = own < shape.n ? shape.rows - first_row : 0;
            const uintptr_t hidden =
                reinterpret_cast<uintptr_t>(shape.hidden) + first_row * row_bytes + 2 * own;
            wait(*sums.there, right);
            if (elected) {
              store_tile(&maps.gate, sums.boxes, first, first_row);
              store_tile(&maps.up, sums.boxes + kBoxBytes, first, first_row);
              store_tiles_commit();
            }
#pragma unroll 3
            for (int row = 4 * (warp - 1) + lane / 8; row < 64; row += 4 * kFinishingWarps) {
              float gate[8], up[8];
              unpack_vec<T>(load_shared_16(sums.at(row, lane % 8)), gate);
              unpack_vec<T>(load_shared_16(sums.at(row, 8 + lane % 8)), up);
#pragma unroll
              for (int j = 0; j < 8; ++j) gate[j] = activate<activation.value>(gate[j]) * up[j];
              if (row < rows) {
                *reinterpret_cast<uint4*>(hidden + row * row_bytes) = pack_vec<T>(gate);
              }
            }
            if (elected) wait_for_stores<0>();
            __syncwarp();
            if (lane == 0) arrive(*sums.read);
          }
        }
      });
    }
  } else {
    take_registers<kGatedMultiplyingRegisters>();
    const int half = warp / 4 - 1;
    multiply_and_hand_over<T, false, true>(
        ring, Handover(boxes, barriers, half), cluster, order.size(), clusters, steps, half,
        [](const float(&sum)[128], bool right, int i) {
          const int at = 64 * (i / 16) + 32 * right + 2 * (i % 16);
          return pack<T>(sum[at], sum[at + 1]);
        });
  }
  sync_cluster();  // the other block may still send to this one's shared memory
}

}  // namespace torchtune_fused
