// The gradients of gate and up from that of the MLP's output, on Hopper: the product
// grad_hidden = grad down (+ grad_low low_down, of an adapter), and in its epilogue
// hidden = activation(gate) * up once more, grad_gate and grad_up, so that grad_hidden never is in
// memory.
//
// Tiles: 128 x 256 of grad_hidden. Of a cluster, each block loads 128 columns of down.
// Memory: grad [rows, k], down [k, n], grad_low [rows, rank], low_down [rank, n]; gate, up and the
// outputs [rows, n], all row-major.
// Grid and shared memory as product.cuh says, and for each warpgroup five boxes: gate and up of 64
// columns twice, one pair under way while the other is worked on and turned into gradients in
// place, and one for hidden.
#pragma once

#include "common/activation.cuh"
#include "mlp/product.cuh"

namespace torchtune_fused {

struct GatedLinearBackwardMaps {
  CUtensorMap grad, grad_low;  // tiles of 128 rows
  CUtensorMap down, low_down;  // tiles of 64 rows, as are all that follow
  CUtensorMap gate, up;
  CUtensorMap hidden, grad_gate, grad_up;
};

struct GatedLinearBackwardShape {
  int rows, n, k;
  int rank;  // of the adapter; 0: none
  Activation activation;
  bool need_hidden;
};

constexpr int kBackwardStages = 3, kBackwardBoxes = 2 * 2 + 1;
constexpr int kBackwardSharedBytes =
    1024 + Ring<kBackwardStages>::kBytes + 2 * kBackwardBoxes * kBoxBytes + 2 * 2 * sizeof(Barrier);

template <typename T>
__global__ void __cluster_dims__(2) __launch_bounds__(kProductThreads, 1)
    gated_linear_backward_kernel(const __grid_constant__ GatedLinearBackwardMaps maps,
                                 const GatedLinearBackwardShape shape) {
  extern __shared__ uint8_t raw[];
  uint8_t* shared = align_1024(raw);
  const uint32_t boxes = shared_address(shared);
  Ring<kBackwardStages> ring(shared + 2 * kBackwardBoxes * kBoxBytes);
  // For each pair of boxes, that it is loaded.
  Barrier* loaded = ring.empty_barriers + kBackwardStages;
  const int rank = cluster_rank(), warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    ring.init_barriers();
    for (int pair = 0; pair < 2 * 2; ++pair) init(loaded[pair], 1);
    fence_init();
  }
  cluster_sync();

  const TileOrder order(shape.rows, (shape.n + kWidth - 1) / kWidth);
  const int wide_steps = steps_of(shape.k), steps = wide_steps + steps_of(shape.rank);
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  int row_pair, column;

  if (warpgroup == 0) {
    give_up_registers<40>();
    if (threadIdx.x == 0) {
      for (int tile = cluster; tile < order.size(); tile += clusters) {
        order.at(tile, row_pair, column);
        for (int step = 0; step < steps; ++step, ring.advance()) {
          const bool wide = step < wide_steps;
          const int depth = (wide ? step : step - wide_steps) * kDepth;
          wait(ring.empty(), ring.parity ^ 1);
          arrive_and_expect(ring.full(), kStageBytes);
          load_tile(ring.first(), wide ? &maps.grad : &maps.grad_low, ring.full(), depth,
                    (2 * row_pair + rank) * kRows);
          for (int box = 2 * rank; box < 2 * rank + 2; ++box) {
            load_tile_multicast(ring.second() + box * kBoxBytes, wide ? &maps.down : &maps.low_down,
                                ring.full(), column * kWidth + 64 * box, depth, 0b11);
          }
        }
      }
    }
  } else {
    take_registers<232>();
    const int half = warpgroup - 1, lane = threadIdx.x % 32;
    const int box_row = threadIdx.x % 128 / 32 * 16 + lane % 16;  // for ldmatrix and stmatrix
    const bool elected = threadIdx.x % 128 == 0;
    const uint32_t pairs = boxes + half * kBackwardBoxes * kBoxBytes;
    const uint32_t hidden = pairs + 4 * kBoxBytes;
    Barrier* pair_loaded = loaded + 2 * half;
    float sum[128];

    for (int tile = cluster; tile < order.size(); tile += clusters) {
      order.at(tile, row_pair, column);
      const int row = (2 * row_pair + rank) * kRows + half * 64;
      const auto load = [&](int i) {
        const uint32_t pair = pairs + i % 2 * 2 * kBoxBytes;
        Barrier& barrier = pair_loaded[i % 2];
        arrive_and_expect(barrier, 2 * kBoxBytes);
        load_tile(pair, &maps.gate, barrier, column * kWidth + 64 * i, row);
        load_tile(pair + kBoxBytes, &maps.up, barrier, column * kWidth + 64 * i, row);
      };
      if (elected) {
        wait_for_stores<0>();
        load(0);
        load(1);
      }
      multiply<T, true>(sum, ring, steps, half);

      with_activation(shape.activation, [&](auto activation) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t gate = pairs + i % 2 * 2 * kBoxBytes, up = gate + kBoxBytes;
          if (elected && i > 0) {
            wait_for_stores<0>();
            if (i < 3) load(i + 1);
          }
          named_sync<128>(1 + half);
          wait(pair_loaded[i % 2], i / 2);
#pragma unroll
          for (int chunk = 0; chunk < 8; chunk += 2) {
            uint32_t g[4], u[4], h[4];
            load_matrix_x4(g, in_box(gate, box_row, chunk + lane / 16));
            load_matrix_x4(u, in_box(up, box_row, chunk + lane / 16));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int at = 4 * (8 * i + chunk + j / 2) + 2 * (j % 2);
              const float2 gates = unpack<T>(g[j]), ups = unpack<T>(u[j]);
              const auto a = activate_with_slope<activation.value>(gates.x);
              const auto b = activate_with_slope<activation.value>(gates.y);
              h[j] = pack<T>(a.value * ups.x, b.value * ups.y);
              g[j] = pack<T>(sum[at] * ups.x * a.slope, sum[at + 1] * ups.y * b.slope);
              u[j] = pack<T>(sum[at] * a.value, sum[at + 1] * b.value);
            }
            store_matrix_x4(in_box(gate, box_row, chunk + lane / 16), g);
            store_matrix_x4(in_box(up, box_row, chunk + lane / 16), u);
            store_matrix_x4(in_box(hidden, box_row, chunk + lane / 16), h);
          }
          fence_async();
          named_sync<128>(1 + half);
          if (elected) {
            const int first = column * kWidth + 64 * i;
            store_tile(&maps.grad_gate, gate, first, row);
            store_tile(&maps.grad_up, up, first, row);
            if (shape.need_hidden) store_tile(&maps.hidden, hidden, first, row);
            store_tiles_commit();
          }
        }
      });
    }
    if (elected) wait_for_stores<0>();
  }
  cluster_sync();  // the other block may still send to this one's shared memory
}

}  // namespace torchtune_fused
