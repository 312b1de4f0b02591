// hidden = activation(x gate^T) * (x up^T), on Hopper: one product with the activation in its
// epilogue, and LoRA adapters as a few more columns of x and of the weights.
//
// Tiles: the second operand of a block's 128 x 256 product is 128 rows of gate, then the same 128 of
// up, so that each thread holds the sums of gate and of up for the same elements. Of a cluster,
// block 0 loads the rows of gate and block 1 those of up.
// Memory: x [rows, k], gate and up [n, k], low [rows, rank], outputs [rows, n], all row-major.
// Grid and shared memory as product.cuh says, with two boxes for the outputs of each warpgroup.
#pragma once

#include "common/activation.cuh"
#include "mlp/product.cuh"

namespace torchtune_fused {

struct GatedLinearMaps {
  CUtensorMap x, gate_weight, up_weight;  // tiles of 128 rows
  CUtensorMap low, low_gate, low_up;      // likewise, the same once more where there are none
  CUtensorMap hidden, gate, up;           // tiles of 64 rows
};

struct GatedLinearShape {
  int rows, n, k;
  int rank, rank_gate;  // of both adapters, and of gate's, which comes first; 0: none
  Activation activation;
  bool save;
};

constexpr int kGatedStages = 4, kGatedWidth = kWidth / 2;
constexpr int kGatedSharedBytes = 1024 + Ring<kGatedStages>::kBytes + 2 * 2 * kBoxBytes;

template <typename T>
__global__ void __cluster_dims__(2) __launch_bounds__(kProductThreads, 1)
    gated_linear_kernel(const __grid_constant__ GatedLinearMaps maps,
                        const GatedLinearShape shape) {
  extern __shared__ uint8_t raw[];
  uint8_t* shared = align_1024(raw);
  const uint32_t boxes = shared_address(shared);
  Ring<kGatedStages> ring(shared + 2 * 2 * kBoxBytes);
  const int rank = cluster_rank(), warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    ring.init_barriers();
    fence_init();
  }
  cluster_sync();

  const TileOrder order(shape.rows, (shape.n + kGatedWidth - 1) / kGatedWidth);
  const int wide_steps = steps_of(shape.k), steps = wide_steps + steps_of(shape.rank);
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  int row_pair, column;

  if (warpgroup == 0) {
    give_up_registers<40>();
    if (threadIdx.x == 0) {
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
    }
  } else {
    take_registers<232>();
    const int half = warpgroup - 1, lane = threadIdx.x % 32;
    const int box_row = threadIdx.x % 128 / 32 * 16 + lane % 16;  // for stmatrix
    const bool elected = threadIdx.x % 128 == 0;
    const uint32_t box = boxes + half * 2 * kBoxBytes;
    float sum[128];
    int turn = 0;

    for (int tile = cluster; tile < order.size(); tile += clusters) {
      multiply<T, false>(sum, ring, steps, half);
      order.at(tile, row_pair, column);
      // Sends 64 columns of this warpgroup's rows to memory, by way of two boxes in turns.
      const auto store = [&](const CUtensorMap* map, int first, auto value) {
        const uint32_t to = box + turn * kBoxBytes;
        if (elected) wait_for_stores<1>();
        named_sync<128>(1 + half);
#pragma unroll
        for (int chunk = 0; chunk < 8; chunk += 2) {
          uint32_t r[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = 4 * (first / 8 + chunk + i / 2) + 2 * (i % 2);
            r[i] = pack<T>(value(at), value(at + 1));
          }
          store_matrix_x4(in_box(to, box_row, chunk + lane / 16), r);
        }
        fence_async();
        named_sync<128>(1 + half);
        if (elected) {
          store_tile(map, to, column * kGatedWidth + first,
                     (2 * row_pair + rank) * kRows + half * 64);
          store_tiles_commit();
        }
        turn ^= 1;
      };
      if (shape.save) {
#pragma unroll
        for (int first = 0; first < kGatedWidth; first += 64) {
          store(&maps.gate, first, [&](int i) { return sum[i]; });
          store(&maps.up, first, [&](int i) { return sum[64 + i]; });
        }
      }
      with_activation(shape.activation, [&](auto activation) {
#pragma unroll
        for (int first = 0; first < kGatedWidth; first += 64) {
          store(&maps.hidden, first,
                [&](int i) { return activate<activation.value>(sum[i]) * sum[64 + i]; });
        }
      });
    }
    if (elected) wait_for_stores<0>();
  }
  cluster_sync();  // the other block may still send to this one's shared memory
}

}  // namespace torchtune_fused
