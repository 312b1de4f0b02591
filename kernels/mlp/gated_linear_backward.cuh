// The gradients of gate and up from that of the MLP's output, on Hopper: the product
// grad_hidden = grad down (+ grad_low low_down, of an adapter), and from it
// hidden = activation(gate) * up once more, grad_gate and grad_up. grad_hidden never is in memory.
//
// Tensor cores limit the product, memory limits the rest: they overlap as handover.cuh says. gate
// and up are on their way to the finishing warps before the sums that they are for.
//
// Tiles: 128 x 256 of grad_hidden. Of a cluster, each block loads 128 columns of down.
// Memory: grad [rows, k], down [k, n], grad_low [rows, rank], low_down [rank, n]; gate, up and the
// outputs [rows, n], all row-major.
// Grid and shared memory as product.cuh says, with a Handover for each multiplying warpgroup: its
// left columns first.
#pragma once

#include "common/activation.cuh"
#include "mlp/handover.cuh"

namespace torchtune_fused {

struct GatedLinearBackwardMaps {
  CUtensorMap grad, grad_low;  // tiles of 128 rows
  CUtensorMap down, low_down;  // tiles of 64 rows
};

struct GatedLinearBackwardShape {
  int rows, n, k;
  int rank;  // of the adapter; 0: none
  const void *gate, *up;
  void *hidden, *grad_gate, *grad_up;  // hidden may be null: not wanted
  Activation activation;
};

constexpr int kBackwardStages = 4;
constexpr int kBackwardSharedBytes = 1024 + Ring<kBackwardStages>::kBytes + Handover::kBytes;

// What a finishing warp works on at a time: four rows of 128 columns. A lane has 8 columns of
// every second row.
struct Piece {
  static constexpr int kRows = 4, kVectors = 2;
  int64_t offset;  // in bytes, of this lane's first row
  int rows;        // from there on within the matrix
  uint4 gate[kVectors], up[kVectors];
};

template <typename V>
__device__ __forceinline__ V* at(const void* data, int64_t bytes) {
  return reinterpret_cast<V*>(reinterpret_cast<uintptr_t>(data) + bytes);
}

// Turns gate and up into their gradients.
template <typename T, Activation kActivation>
__device__ __forceinline__ void gated_gradients(uint4 grad, uint4& gate, uint4& up,
                                                uint4& hidden) {
  float d[8], g[8], u[8], h[8];
  unpack_vec<T>(grad, d);
  unpack_vec<T>(gate, g);
  unpack_vec<T>(up, u);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const auto a = activate_with_slope<kActivation>(g[i]);
    h[i] = a.value * u[i];
    g[i] = d[i] * u[i] * a.slope;
    u[i] = d[i] * a.value;
  }
  hidden = pack_vec<T>(h);
  gate = pack_vec<T>(g);
  up = pack_vec<T>(u);
}

template <typename T>
__global__ void __cluster_dims__(2) __launch_bounds__(kProductThreads, 1)
    gated_linear_backward_kernel(const __grid_constant__ GatedLinearBackwardMaps maps,
                                 const GatedLinearBackwardShape shape) {
  extern __shared__ uint8_t raw[];
  uint8_t* shared = align_1024(raw);
  const uint32_t boxes = shared_address(shared);
  Ring<kBackwardStages> ring(shared + 4 * kBoxBytes);
  Barrier* barriers = ring.empty_barriers + kBackwardStages;
  const int rank = cluster_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    ring.init_barriers();
    for (int half = 0; half < 2; ++half) Handover(boxes, barriers, half).init_barriers();
    fence_init();
  }
  sync_cluster();
  wait_for_grid();

  const TileOrder order(shape.rows, (shape.n + kWidth - 1) / kWidth);
  const int wide_steps = steps_of(shape.k), steps = wide_steps + steps_of(shape.rank);
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  int row_pair, column;

  if (warp < 4) {
    give_up_registers<kFinishingRegisters>();
    if (warp == 0) {
      for (int tile = cluster; lane == 0 && tile < order.size(); tile += clusters) {
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
    } else {
      // A tile's pieces, in the order in which they come: left and right, above and below.
      constexpr int kOfHandover = 64 / Piece::kRows, kOfTile = 4 * kOfHandover;
      const int64_t row_bytes = int64_t{2} * shape.n;
      int next_tile = cluster, next_piece = warp - 1;  // every third one is this warp's
      const auto load_next = [&](Piece& piece) {
        piece.rows = 0;
        if (next_tile >= order.size()) return;
        if (next_piece == warp - 1) order.at(next_tile, row_pair, column);
        const int row = (2 * row_pair + rank) * kRows +
                        next_piece % (2 * kOfHandover) * Piece::kRows + lane / 16;
        const int first = column * kWidth +
                          next_piece / (2 * kOfHandover) * Handover::kColumns + lane % 16 * 8;
        piece.offset = row * row_bytes + 2 * first;
        if (first < shape.n) piece.rows = shape.rows - row;
#pragma unroll
        for (int i = 0; i < Piece::kVectors; ++i) {
          if (2 * i < piece.rows) {
            piece.gate[i] = __ldcs(at<const uint4>(shape.gate, piece.offset + 2 * i * row_bytes));
            piece.up[i] = __ldcs(at<const uint4>(shape.up, piece.offset + 2 * i * row_bytes));
          }
        }
        next_piece += kFinishingWarps;
        if (next_piece >= kOfTile) next_piece = warp - 1, next_tile += clusters;
      };

      with_activation(shape.activation, [&](auto activation) {
        Piece next;
        load_next(next);
        for (int tile = cluster; tile < order.size(); tile += clusters) {
#pragma unroll 1
          for (int i = warp - 1; i < kOfTile; i += kFinishingWarps) {
            const bool right = i >= 2 * kOfHandover;
            const Handover sums(boxes, barriers, i / kOfHandover % 2);
            const int of_handover = i % kOfHandover;
            Piece piece = next;
            load_next(next);
            if (of_handover < kFinishingWarps) wait(*sums.there, right);
            uint4 grad[Piece::kVectors], hidden;
#pragma unroll
            for (int v = 0; v < Piece::kVectors; ++v) {
              const int row = of_handover * Piece::kRows + 2 * v + lane / 16;
              grad[v] = load_shared_16(sums.at(row, lane % 16));
            }
            __syncwarp();
            if (lane == 0 && of_handover + kFinishingWarps >= kOfHandover) arrive(*sums.read);
#pragma unroll
            for (int v = 0; v < Piece::kVectors; ++v) {
              if (2 * v < piece.rows) {
                gated_gradients<T, activation.value>(grad[v], piece.gate[v], piece.up[v], hidden);
                const int64_t offset = piece.offset + 2 * v * row_bytes;
                __stcs(at<uint4>(shape.grad_gate, offset), piece.gate[v]);
                __stcs(at<uint4>(shape.grad_up, offset), piece.up[v]);
                if (shape.hidden) __stcs(at<uint4>(shape.hidden, offset), hidden);
              }
            }
          }
        }
      });
    }
  } else {
    take_registers<kMultiplyingRegisters>();
    const int half = warp / 4 - 1;
    multiply_and_hand_over<T, true, false>(
        ring, Handover(boxes, barriers, half), cluster, order.size(), clusters, steps, half,
        [](const float(&sum)[128], bool right, int i) {
          const int at = 64 * right + 2 * i;
          return pack<T>(sum[at], sum[at + 1]);
        });
  }
  sync_cluster();  // the other block may still send to this one's shared memory
}

}  // namespace torchtune_fused
