// Up to three sums of matrix products in one launch on Hopper: linear layers of one input with
// their adapters, out = x weight^T + low b^T, or the gradient of that input, out = sum of grad
// weight. No sum leaves the registers before it is complete, so none is read back from memory. To
// the only sum of a launch a matrix can be added, such as a residual stream; queries and keys can
// be rotated.
//
// Tiles: 128 x 256 of an output; of a cluster, each block loads half of the second operand's tile.
// What is added comes through the same ring, its 128 x 256 in two stages after those of the products.
//
// Memory: outputs and addend [rows, n], first operands [rows, k], second ones [n, k], or [k, n] with
// kAcrossK; row-major.
//
// Grid and shared memory as product.cuh says, with two boxes for the outputs of each warpgroup.
#pragma once

#include "mlp/mlp.h"
#include "mlp/product.cuh"
#include "mlp/rotate_heads.cuh"

namespace torchtune_fused {

struct GroupedProductMaps {
  CUtensorMap first[kMaxTerms];   // tiles of 128 rows
  CUtensorMap second[kMaxTerms];  // of 128 rows; with kAcrossK of 64 rows
  CUtensorMap out[kMaxSums];      // of 64 rows
  CUtensorMap addend;             // of 128 rows
};

struct GroupedProductShape {
  int rows, outputs;
  int rotated;                // how many of the outputs, the first ones
  int steps[kMaxTerms];       // of kDepth
  int term_ends[kMaxSums];    // how many terms there are up to and with those of an output
  int column_ends[kMaxSums];  // likewise columns of tiles
  bool adds;
};

constexpr int kGroupedStages = 4;
constexpr int kGroupedSharedBytes = 1024 + Ring<kGroupedStages>::kBytes + 2 * 2 * kBoxBytes;
constexpr int kAddendStages = 2;
constexpr int kAddendWidth = kWidth / kAddendStages;
static_assert(kRows * kAddendWidth * 2 == kSecondBytes);  // where a stage of the addend lies

// Adds the next kAddendStages stages to sum[64, 256]; `row` as store_matrix_x4 wants it.
template <typename T>
__device__ __forceinline__ void add_stages(float (&sum)[128], Ring<kGroupedStages>& ring, int half,
                                           int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int stage = 0; stage < kAddendStages; ++stage, ring.advance()) {
    wait(ring.full(), ring.parity);
#pragma unroll
    for (int column = 0; column < kAddendWidth; column += 16) {
      const uint32_t box = ring.second() + column / 64 * 2 * kBoxBytes + half * kBoxBytes;
      uint32_t r[4];
      load_matrix_x4(r, in_box(box, row, column % 64 / 8 + lane / 16));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * ((stage * kAddendWidth + column) / 8 + j / 2) + 2 * (j % 2);
        const float2 pair = unpack<T>(r[j]);
        sum[at] += pair.x;
        sum[at + 1] += pair.y;
      }
    }
    if (lane < 2) arrive_at(ring.empty(), lane);
  }
}

template <typename T, bool kAcrossK>
__global__ void __cluster_dims__(2) __launch_bounds__(kProductThreads, 1)
    grouped_product_kernel(const __grid_constant__ GroupedProductMaps maps,
                           const __grid_constant__ GroupedProductShape shape,
                           const __grid_constant__ RopeParams rope) {
  extern __shared__ uint8_t raw[];
  uint8_t* shared = align_1024(raw);
  const uint32_t boxes = shared_address(shared);
  Ring<kGroupedStages> ring(shared + 2 * 2 * kBoxBytes);
  // Rather than from cluster_rank(), which would be kept in a register.
  const int rank = blockIdx.x % 2, warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    ring.init_barriers();
    fence_init();
  }
  sync_cluster();
  wait_for_grid();

  const TileOrder order(shape.rows, shape.column_ends[shape.outputs - 1]);
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  // Of the tile: its output, its column within that, and the output's first term.
  int row_pair, column, output, term;
  const auto locate = [&](int tile) {
    order.at(tile, row_pair, column);
    output = 0, term = 0;
    int first_column = 0;
    while (column >= shape.column_ends[output]) {
      first_column = shape.column_ends[output], term = shape.term_ends[output];
      ++output;
    }
    column -= first_column;
  };

  if (warpgroup == 0) {
    give_up_registers<40>();
    if (threadIdx.x == 0) {
      for (int tile = cluster; tile < order.size(); tile += clusters) {
        locate(tile);
        for (; term < shape.term_ends[output]; ++term) {
          for (int step = 0; step < shape.steps[term]; ++step, ring.advance()) {
            wait(ring.empty(), ring.parity ^ 1);
            arrive_and_expect(ring.full(), kStageBytes);
            load_tile(ring.first(), &maps.first[term], ring.full(), step * kDepth,
                      (2 * row_pair + rank) * kRows);
            if constexpr (kAcrossK) {
              for (int box = 2 * rank; box < 2 * rank + 2; ++box) {
                load_tile_multicast(ring.second() + box * kBoxBytes, &maps.second[term],
                                    ring.full(), column * kWidth + 64 * box, step * kDepth, 0b11);
              }
            } else {
              load_tile_multicast(ring.second() + rank * kSecondBytes / 2, &maps.second[term],
                                  ring.full(), step * kDepth, column * kWidth + rank * kWidth / 2,
                                  0b11);
            }
          }
        }
        for (int stage = 0; shape.adds && stage < kAddendStages; ++stage, ring.advance()) {
          wait(ring.empty(), ring.parity ^ 1);
          arrive_and_expect(ring.full(), kSecondBytes);
          for (int box = 0; box < 2; ++box) {
            load_tile(ring.second() + box * 2 * kBoxBytes, &maps.addend, ring.full(),
                      column * kWidth + stage * kAddendWidth + 64 * box,
                      (2 * row_pair + rank) * kRows);
          }
        }
      }
    }
  } else {
    take_registers<232>();
    const int half = warpgroup - 1, lane = threadIdx.x % 32;
    const int box_row = threadIdx.x % 128 / 32 * 16 + lane % 16;  // for ldmatrix
    Outbox outbox(boxes, half);
    float sum[128];

    for (int tile = cluster; tile < order.size(); tile += clusters) {
      locate(tile);
      int steps = 0;
      for (; term < shape.term_ends[output]; ++term) steps += shape.steps[term];
      if constexpr (kAcrossK) {
        multiply<T, kAcrossK>(sum, ring, steps, half);
      } else {
        Angles angles;
        const bool rotates = output < shape.rotated;
        multiply<T, kAcrossK>(sum, ring, steps, half, [&](int step) {
          if (step > 0 || !rotates) return;
          angles.locate(rope, (2 * row_pair + rank) * kRows + half * 64);
          angles.load(rope, 0);
        });
        if (rotates) rotate_heads(sum, rope, angles);
      }
      if (shape.adds) add_stages<T>(sum, ring, half, box_row);
      outbox.store<T>(sum, maps.out[output], (2 * row_pair + rank) * kRows + half * 64,
                      column * kWidth);
    }
    outbox.close();
  }
  sync_cluster();  // the other block may still send to this one's shared memory
}

}  // namespace torchtune_fused
