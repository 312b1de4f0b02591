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
  int rank;        // of the adapter; 0: none
  bool keep_grad;  // in L2: every column of tiles reads it, and so do the kernels that follow
  const void *gate, *up;
  void *hidden, *grad_gate, *grad_up;  // hidden may be null: not wanted
  Activation activation;
};

constexpr int kBackwardStages = 4;
constexpr int kBackwardSharedBytes = 1024 + Ring<kBackwardStages>::kBytes + Handover::kBytes;

// Of a thread, for finishing and for multiplying; before, the 3 warpgroups have 168 each.
constexpr int kBackwardFinishingRegisters = 136, kBackwardMultiplyingRegisters = 184;

// What a finishing warp works on at a time: eight rows of 128 columns. A lane has 8 columns of the
// left 64 and as many of the right, of every fourth row. In ptxas's code a wait for one load is one
// for all that are under way, so the loads of the next piece start together, before the arithmetic
// of this one. With four rows they would take longer than that.
struct Piece {
  static constexpr int kRows = 8, kVectors = 4;
  int64_t offset;     // in bytes, of this lane's first vector
  int rows, columns;  // from there on within the matrix
  uint4 gate[kVectors], up[kVectors];

  static __device__ int row(int v) { return v / 2 * 4; }
  static __device__ int column(int v) { return v % 2 * 64; }
  __device__ bool has(int v) const { return row(v) < rows && column(v) < columns; }
  __device__ int64_t offset_of(int v, uint32_t row_bytes) const {
    return offset + row(v) * int64_t{row_bytes} + 2 * column(v);
  }
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

  // Narrower bands than elsewhere: what the finishing warps load and store goes through L2 as well.
  const TileOrder<8> order(shape.rows, (shape.n + kWidth - 1) / kWidth);
  const int wide_steps = steps_of(shape.k), steps = wide_steps + steps_of(shape.rank);
  const int cluster = blockIdx.x / 2, clusters = gridDim.x / 2;
  int row_pair, column;

  if (warp < 4) {
    give_up_registers<kBackwardFinishingRegisters>();
    if (warp == 0) {
      const uint64_t evict_last = evict_last_policy();
      for (int tile = cluster; lane == 0 && tile < order.size(); tile += clusters) {
        order.at(tile, row_pair, column);
        for (int step = 0; step < steps; ++step, ring.advance()) {
          const bool wide = step < wide_steps;
          const int depth = (wide ? step : step - wide_steps) * kDepth;
          wait(ring.empty(), ring.parity ^ 1);
          arrive_and_expect(ring.full(), kStageBytes);
          const CUtensorMap* grad = wide ? &maps.grad : &maps.grad_low;
          const int row = (2 * row_pair + rank) * kRows;
          if (shape.keep_grad) {
            load_tile(ring.first(), grad, ring.full(), depth, row, evict_last);
          } else {
            load_tile(ring.first(), grad, ring.full(), depth, row);
          }
          for (int box = 2 * rank; box < 2 * rank + 2; ++box) {
            load_tile_multicast(ring.second() + box * kBoxBytes, wide ? &maps.down : &maps.low_down,
                                ring.full(), column * kWidth + 64 * box, depth, 0b11);
          }
        }
      }
    } else {
      // A tile's pieces, in the order in which they come: left and right, above and below.
      constexpr unsigned kOfHandover = 64 / Piece::kRows, kOfTile = 4 * kOfHandover;
      const uint32_t row_bytes = 2 * shape.n;
      int64_t origin = 0;  // of this lane's first vector in a tile
      int rows, columns;   // from there on within the matrix
      const auto enter = [&](int tile) {
        rows = columns = 0;
        if (tile >= order.size()) return;
        order.at(tile, row_pair, column);
        const int row = (2 * row_pair + rank) * kRows + lane / 8;
        const int first = column * kWidth + lane % 8 * 8;
        origin = int64_t{row} * row_bytes + 2 * first;
        rows = shape.rows - row, columns = shape.n - first;
      };
      const auto load = [&](Piece& piece, unsigned i) {
        const int row = i % (2 * kOfHandover) * Piece::kRows;
        const int right = i / (2 * kOfHandover) * Handover::kColumns;
        piece.offset = origin + row * int64_t{row_bytes} + 2 * right;
        piece.rows = rows - row, piece.columns = columns - right;
#pragma unroll
        for (int v = 0; v < Piece::kVectors; ++v) {
          if (piece.has(v)) {
            const int64_t offset = piece.offset_of(v, row_bytes);
            piece.gate[v] = __ldcs(at<const uint4>(shape.gate, offset));
            piece.up[v] = __ldcs(at<const uint4>(shape.up, offset));
          }
        }
      };

      with_activation(shape.activation, [&](auto activation) {
        const unsigned own = warp - 1;  // and every third one from there on
        Piece next;
        enter(cluster);
        load(next, own);
        for (int tile = cluster; tile < order.size(); tile += clusters) {
#pragma unroll 1
          for (unsigned i = own; i < kOfTile; i += kFinishingWarps) {
            Piece piece = next;
            unsigned ahead = i + kFinishingWarps;
            if (ahead >= kOfTile) enter(tile + clusters), ahead = own;
            load(next, ahead);
            const Handover sums(boxes, barriers, i / kOfHandover % 2);
            const unsigned of_handover = i % kOfHandover;
            if (of_handover < kFinishingWarps) wait(*sums.there, i / (2 * kOfHandover));
#pragma unroll
            for (int v = 0; v < Piece::kVectors; ++v) {
              const int row = of_handover * Piece::kRows + lane / 8 + Piece::row(v);
              const uint4 grad = load_shared_16(sums.at(row, lane % 8 + Piece::column(v) / 8));
              if (v == Piece::kVectors - 1) {
                __syncwarp();
                if (lane == 0 && of_handover + kFinishingWarps >= kOfHandover) arrive(*sums.read);
              }
              if (piece.has(v)) {
                uint4 hidden;
                gated_gradients<T, activation.value>(grad, piece.gate[v], piece.up[v], hidden);
                const int64_t offset = piece.offset_of(v, row_bytes);
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
    take_registers<kBackwardMultiplyingRegisters>();
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
