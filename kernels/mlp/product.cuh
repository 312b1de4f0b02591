// What the matrix products of the gated MLP on Hopper share: a persistent grid of clusters of two
// blocks, a ring of operand tiles in shared memory, and the loop that multiplies them.
//
// Tiles: a block computes kRows x kWidth of the result, two warpgroups 64 rows each. The blocks of a
// cluster lie one below the other, and have their tile of the second operand in common: each loads
// one half of it, for both (multicast). Warpgroup 0 loads, by one thread; 1 and 2 multiply.
#pragma once

#include <type_traits>

#include "common/launch.h"
#include "common/vec.cuh"
#include "mlp/hopper.cuh"

namespace torchtune_fused {

constexpr int kRows = 128, kWidth = 256, kDepth = 64;
constexpr int kProductThreads = 3 * 128;
constexpr int kBoxBytes = 64 * 64 * 2;  // what TMA moves at a time: 64 rows of 64 elements
constexpr int kFirstBytes = kRows * kDepth * 2, kSecondBytes = kWidth * kDepth * 2;
constexpr int kStageBytes = kFirstBytes + kSecondBytes;

__host__ __device__ constexpr int steps_of(int k) { return (k + kDepth - 1) / kDepth; }

// The order in which clusters go through the tiles: kBand pairs of rows of tiles at a time, so that
// these rows and the columns in use stay in L2.
template <int kBand = 16>
struct TileOrder {
  int row_pairs, columns;

  __device__ TileOrder(int row_count, int columns)
      : row_pairs((row_count + 2 * kRows - 1) / (2 * kRows)), columns(columns) {}
  __device__ int size() const { return row_pairs * columns; }
  __device__ void at(int i, int& row_pair, int& column) const {
    const int first = i / (kBand * columns) * kBand;
    const int height = min(kBand, row_pairs - first);
    i -= first * columns;
    row_pair = first + i % height;
    column = i / height;
  }
};

// kStages stages, each with a barrier that it is full, and one that all readers are done with it.
template <int kStages>
struct Ring {
  uint32_t stages;
  Barrier *full_barriers, *empty_barriers;
  int stage = 0;
  uint32_t parity = 0;

  static constexpr int kBytes = kStages * (kStageBytes + 2 * sizeof(Barrier));

  // `shared` is at a multiple of 1024 bytes.
  __device__ explicit Ring(uint8_t* shared)
      : stages(shared_address(shared)),
        full_barriers(reinterpret_cast<Barrier*>(shared + kStages * kStageBytes)),
        empty_barriers(full_barriers + kStages) {}

  __device__ void init_barriers() const {  // by one thread
    for (int s = 0; s < kStages; ++s) {
      init(full_barriers[s], 1);
      init(empty_barriers[s], 2 * 8);  // the multiplying warps of both blocks
    }
  }
  __device__ uint32_t first() const { return stages + stage * kStageBytes; }
  __device__ uint32_t second() const { return first() + kFirstBytes; }
  __device__ Barrier& full() const { return full_barriers[stage]; }
  __device__ Barrier& empty() const { return empty_barriers[stage]; }
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Dynamic shared memory from the next multiple of 1024 bytes on.
__device__ __forceinline__ uint8_t* align_1024(uint8_t* shared) {
  return shared + (1024 - shared_address(shared) % 1024) % 1024;
}

// sum = the product over the next `steps` stages, of which multiply_slice(k, add) multiplies 16 of
// k from `k` on. While the tensor cores work at a step, calls meanwhile(step).
template <int kSums, int kStages, typename S, typename F>
__device__ __forceinline__ void multiply_slices(float (&sum)[kSums], Ring<kStages>& ring, int steps,
                                                S multiply_slice, F meanwhile) {
  const uint32_t lane = threadIdx.x % 32;
  Barrier* previous = nullptr;
  const auto release = [&] {
    if (lane < 2) arrive_at(*previous, lane);
  };
  for (int step = 0; step < steps; ++step, ring.advance()) {
    wait(ring.full(), ring.parity);
    wgmma_begin();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) multiply_slice(k, step > 0 || k > 0);
    wgmma_commit();
    meanwhile(step);
    if (step > 0) {
      wgmma_wait_for_operands<1>();
      release();
    }
    previous = &ring.empty();
  }
  wgmma_wait<0>(sum);
  release();
}

// The product of this warpgroup's rows, 256 columns wide.
template <typename T, bool kAcrossK, int kStages, typename F>
__device__ __forceinline__ void multiply(float (&sum)[128], Ring<kStages>& ring, int steps,
                                         int half, F meanwhile) {
  const auto slice = [&](int k, bool add) {
    const uint32_t first = ring.first() + half * (kFirstBytes / 2), second = ring.second();
    const uint64_t a = row_operand(first + 2 * k);
    if constexpr (kAcrossK) {
      Wgmma<T, kWidth>::rows_by_columns(sum, a, column_operand(second + 128 * k, kBoxBytes), add);
    } else {
      Wgmma<T, kWidth>::rows(sum, a, row_operand(second + 2 * k), add);
    }
  };
  multiply_slices(sum, ring, steps, slice, meanwhile);
}

template <typename T, bool kAcrossK, int kStages>
__device__ __forceinline__ void multiply(float (&sum)[128], Ring<kStages>& ring, int steps,
                                         int half) {
  multiply<T, kAcrossK>(sum, ring, steps, half, [](int) {});
}

// Where 16 bytes, `chunk` of 8, of a row of a box lie.
__device__ __forceinline__ uint32_t in_box(uint32_t box, int row, int chunk) {
  return box + row * 128 + (chunk ^ row % 8) * 16;
}

// Where a multiplying warpgroup lays its rounded sums for TMA to store: two boxes, by turns.
class Outbox {
 public:
  // `boxes`: those of the first warpgroup, followed by those of the second.
  __device__ Outbox(uint32_t boxes, int half)
      : box_(boxes + half * 2 * kBoxBytes), barrier_(1 + half) {}

  // Stores sum[64, 2 kSums] to where `row` and `column` of the matrix are its first ones.
  template <typename T, int kSums>
  __device__ __forceinline__ void store(const float (&sum)[kSums], const CUtensorMap& map, int row,
                                        int column) {
    const int lane = threadIdx.x % 32, box_row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < kSums / 32; ++i, turn_ ^= 1) {
      const uint32_t to = box_ + turn_ * kBoxBytes;
      if (elected()) wait_for_stores<1>();
      named_sync<128>(barrier_);
#pragma unroll
      for (int chunk = 0; chunk < 8; chunk += 2) {
        uint32_t r[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = 4 * (8 * i + chunk + j / 2) + 2 * (j % 2);
          r[j] = pack<T>(sum[at], sum[at + 1]);
        }
        store_matrix_x4(in_box(to, box_row, chunk + lane / 16), r);
      }
      fence_async();
      named_sync<128>(barrier_);
      if (elected()) {
        store_tile(&map, to, column + 64 * i, row);
        store_tiles_commit();
      }
    }
  }

  // Before the block ends.
  __device__ void close() const {
    if (elected()) wait_for_stores<0>();
  }

 private:
  __device__ static bool elected() { return threadIdx.x % 128 == 0; }
  uint32_t box_;
  int barrier_, turn_ = 0;
};

// Launches a kernel of this kind: a block for each SM.
template <typename... Args>
void launch_product(void (*kernel)(Args...), int shared_bytes, cudaStream_t stream,
                    const std::type_identity_t<Args>&... args) {
  allow_shared_memory(kernel, shared_bytes);
  const unsigned blocks = device_properties().num_sms / 2 * 2;
  launch_waiting(kernel, blocks, kProductThreads, shared_bytes, stream, args...);
}

}  // namespace torchtune_fused
