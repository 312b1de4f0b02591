// How the gated MLP's products hand their sums over, so that the tensor cores are busy with one
// tile while memory is with the one before.
//
// Warp 0 loads operands, the warpgroups 1 and 2 multiply. Of their sums, rounded as a product by
// itself would round them, they leave half in shared memory, keep the other half in registers, and
// go on; the warps 1 to 3 finish what lies there. In the middle of the next tile the half that was
// kept follows. Beside a ring of four stages there is no room for more, and with three stages the
// kernels are slower.
#pragma once

#include "mlp/product.cuh"

namespace torchtune_fused {

constexpr int kFinishingWarps = 3;

// Half of the sums of a warpgroup on their way: 64 x 128 elements in two boxes. Which columns come
// first and which second is the kernel's choice.
struct Handover {
  uint32_t boxes;
  Barrier *there, *read;

  static constexpr int kColumns = 128, kBytes = 2 * (2 * kBoxBytes + 2 * sizeof(Barrier));

  // Of warpgroup `half` of the two. Boxes and barriers of both lie together.
  __device__ Handover(uint32_t boxes, Barrier* barriers, int half)
      : boxes(boxes + half * 2 * kBoxBytes),
        there(barriers + 2 * half),
        read(barriers + 2 * half + 1) {}

  __device__ void init_barriers() const {  // by one thread
    init(*there, 4);
    init(*read, kFinishingWarps);
  }
  // Where 16 bytes, `chunk` of 16, of a row lie.
  __device__ uint32_t at(int row, int chunk) const {
    return in_box(boxes + chunk / 8 * kBoxBytes, row, chunk % 8);
  }
  // By the warpgroup, first and second half in turns. pair(i) is the i-th pair of columns that this
  // thread holds of the half. kSent: TMA may send the boxes to memory as they are.
  template <bool kSent, typename F>
  __device__ void put(bool second, F pair) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    wait(*read, !second);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t r[4] = {pair(4 * i), pair(4 * i + 1), pair(4 * i + 2), pair(4 * i + 3)};
      store_matrix_x4(at(row, 2 * i + lane / 16), r);
    }
    if constexpr (kSent) fence_async();
    __syncwarp();
    if (lane == 0) arrive(*there);
  }
};

// What a multiplying warpgroup does: the product for every `clusters`-th of `tiles` tiles from
// `cluster` on. pair(sum, second, i) is put's pair(i).
template <typename T, bool kAcrossK, bool kSent, int kStages, typename F>
__device__ __forceinline__ void multiply_and_hand_over(Ring<kStages>& ring, const Handover& sums,
                                                       int cluster, int tiles, int clusters,
                                                       int steps, int half, F pair) {
  float sum[128];
  uint32_t kept[32] = {};
  const auto put_kept = [&] { sums.put<kSent>(true, [&](int i) { return kept[i]; }); };
  for (int tile = cluster; tile < tiles; tile += clusters) {
    multiply<T, kAcrossK>(sum, ring, steps, half, [&](int step) {
      if (step == steps / 2 && tile != cluster) put_kept();
    });
#pragma unroll
    for (int i = 0; i < 32; ++i) kept[i] = pair(sum, true, i);
    sums.put<kSent>(false, [&](int i) { return pair(sum, false, i); });
  }
  if (cluster < tiles) put_kept();
}

}  // namespace torchtune_fused
