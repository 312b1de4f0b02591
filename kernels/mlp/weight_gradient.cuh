// Gradients of the weights of linear layers of one input on Hopper, in one launch:
// out = grad^T x of each.
//
// Neither operand is transposed on the way: tiles arrive as they lie, rows of tokens, and wgmma
// reads both across them.
//
// Tiles: 128 x kColumns of an output, of the height that product.cuh says. The blocks of a cluster
// have their tile of x in common; each loads half of its tokens, for both.
// Memory: grads [tokens, n], x [tokens, k], outputs [n, k], row-major.
// Grid and shared memory as product.cuh says, with two boxes for the outputs of each warpgroup.
#pragma once

#include "mlp/mlp.h"
#include "mlp/product.cuh"

namespace torchtune_fused {

struct WeightGradientMaps {
  CUtensorMap grad[kMaxSums];  // tiles of 64 tokens
  CUtensorMap x;               // of 32 tokens
  CUtensorMap out[kMaxSums];   // of 64 rows
};

struct WeightGradientShape {
  int tokens, outputs, columns;  // columns of tiles
  int pair_ends[kMaxSums];       // pairs of rows of tiles up to and with those of an output
};

constexpr int kGradientStages = 4;
constexpr int kGradientSharedBytes = 1024 + Ring<kGradientStages>::kBytes + 2 * 2 * kBoxBytes;

template <typename T, int kColumns>
__global__ void __cluster_dims__(2) __launch_bounds__(kProductThreads, 1)
    weight_gradient_kernel(const __grid_constant__ WeightGradientMaps maps,
                           const __grid_constant__ WeightGradientShape shape) {
  constexpr int kBoxes = kColumns / 64, kHalfBytes = kBoxBytes / 2;
  extern __shared__ uint8_t raw[];
  uint8_t* shared = align_1024(raw);
  const uint32_t boxes = shared_address(shared);
  Ring<kGradientStages> ring(shared + 2 * 2 * kBoxBytes);
  const int rank = cluster_rank(), warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    ring.init_barriers();
    fence_init();
  }
  sync_cluster();
  wait_for_grid();

  const TileOrder<8> order(2 * kRows * shape.pair_ends[shape.outputs - 1], shape.columns);
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  const int steps = steps_of(shape.tokens);
  int output, row, column;  // of this block's tile: its output, and where in that it begins
  const auto locate = [&](int tile) {
    int pair;
    order.at(tile, pair, column);
    int first_pair = 0;
    for (output = 0; pair >= shape.pair_ends[output]; ++output) {
      first_pair = shape.pair_ends[output];
    }
    row = (2 * (pair - first_pair) + rank) * kRows;
    column *= kColumns;
  };

  if (warpgroup == 0) {
    give_up_registers<40>();
    if (threadIdx.x == 0) {
      for (int tile = cluster; tile < order.size(); tile += clusters) {
        locate(tile);
        for (int step = 0; step < steps; ++step, ring.advance()) {
          wait(ring.empty(), ring.parity ^ 1);
          arrive_and_expect(ring.full(), kFirstBytes + kBoxes * kBoxBytes);
          const int token = step * kDepth;
          for (int box = 0; box < 2; ++box) {
            load_tile(ring.first() + box * kBoxBytes, &maps.grad[output], ring.full(),
                      row + 64 * box, token);
          }
#pragma unroll
          for (int box = 0; box < kBoxes; ++box) {
            load_tile_multicast(ring.second() + box * kBoxBytes + rank * kHalfBytes, &maps.x,
                                ring.full(), column + 64 * box, token + rank * kDepth / 2, 0b11);
          }
        }
      }
    }
  } else {
    take_registers<232>();
    const int half = warpgroup - 1;
    Outbox outbox(boxes, half);
    float sum[kColumns / 2];
    for (int tile = cluster; tile < order.size(); tile += clusters) {
      locate(tile);
      const auto slice = [&](int k, bool add) {
        const uint32_t grads = ring.first() + half * kBoxBytes + 128 * k;
        Wgmma<T, kColumns>::columns_by_columns(sum, column_operand(grads, kBoxBytes),
                                               column_operand(ring.second() + 128 * k, kBoxBytes),
                                               add);
      };
      multiply_slices(sum, ring, steps, slice, [](int) {});
      outbox.store<T>(sum, maps.out[output], row + half * 64, column);
    }
    outbox.close();
  }
  sync_cluster();  // the other block may still send to this one's shared memory
}

}  // namespace torchtune_fused
