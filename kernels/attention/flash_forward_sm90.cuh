// Attention of many queries on Hopper: exact, with an online softmax (Dao, FlashAttention-2, 2023),
// and with copies, products and softmax that overlap (Shah et al., FlashAttention-3, 2024,
// https://arxiv.org/abs/2407.08608).
//
// Grid: a block per SM, which stays and takes tile after tile of kRows queries of a head, heaviest
// first, from a counter that all blocks share. Block: a warpgroup of which one warp produces, and
// warpgroups that consume, 64 queries each.
//
//   D           queries   keys   slots: Q, K, V   shared memory
//   up to 64    192       128    2, 4, 4          200 KB
//   up to 96    192        96    2, 2, 2          216 KB
//   up to 128   128       128    2, 2, 2          224 KB
//   up to 256   128        64    1, 2, 2          208 KB
//
// The producer finds the blocks of keys that any query of the tile sees, from the last to the
// first, and has the copy engine load them into rings in shared memory, K and V apart, in pieces of
// 64 columns as tma.cuh lays them out. With each block goes a note of what it is to each consumer:
// most are seen in whole by every query, only the others pay for masks, and some need no look at
// all.
//
// A consumer holds in registers the scores S = Q K^T of a block, the probabilities P of the block
// before, and O. A step starts S of the next block and O += P V of the present one, and takes the
// softmax of S while O is under way, by the maxima of earlier blocks: nothing is searched for a new
// one unless the probabilities turn out too large, and the scores are then computed once more. O
// leaves through shared memory, 16 rows of a warp at a time.
#pragma once

#include "attention/flash_forward_sm90_consumer.cuh"
#include "attention/flash_forward_sm90_producer.cuh"
#include "common/launch.h"

namespace torchtune_fused {

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    flash_forward_sm90_kernel(const __grid_constant__ ForwardKernelParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<Shape>*>(memory);
  constexpr int kConsumerWarps = 4 * Shape::kConsumers;
  const int warp = uniform(threadIdx.x / 32);

  if (threadIdx.x == 0) {
    prefetch_map(p.q);
    prefetch_map(p.k);
    prefetch_map(p.v);
    prefetch_map(p.out);
    for (int i = 0; i < Shape::kQuerySlots; ++i) {
      init(shared.q_full[i], 1);
      init(shared.q_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < Shape::kSlots; ++i) {
      init(shared.k_full[i], 1);
      init(shared.k_empty[i], kConsumerWarps);
      init(shared.v_full[i], 1);
      init(shared.v_empty[i], kConsumerWarps);
    }
    fence_init();
  }
  __syncthreads();
  wait_for_grid();

  if (warp < 4) {
    give_up_registers<Shape::kProducerRegisters>();
    if (warp == 0) produce<Shape>(p, shared);
  } else {
    take_registers<Shape::kConsumerRegisters>();
    const int lane = threadIdx.x % 32;
    Consumer<T, Shape>{p, shared, warp / 4 - 1, warp % 4, lane}.run();
  }
}

template <int kHeadDim>
struct FlashForwardSm90 {
  using Shape = ForwardShape<kHeadDim>;

  static void launch(const FlashAttentionParams& a, TileCounter* counter, cudaStream_t stream) {
    if (a.batch == 0 || a.heads == 0 || a.queries == 0) return;
    constexpr double kLog2e = 1.4426950408889634;
    constexpr int64_t kL2Bytes = 32 << 20;  // of the keys and values that are read at one time
    const auto map = [&](const void* data, const int64_t (&stride)[3], int heads, int rows,
                         int tile_rows) {
      return piece_map(data, stride, a.batch, heads, rows, a.head_dim, tile_rows, a.dtype);
    };
    ForwardKernelParams p;
    p.q = map(a.q, a.q_stride, a.heads, a.queries, Shape::kRows);
    p.k = map(a.k, a.k_stride, a.kv_heads, a.keys, Shape::kKeys);
    p.v = map(a.v, a.v_stride, a.kv_heads, a.keys, Shape::kKeys);
    p.out = map(a.out, a.out_stride, a.heads, a.queries, 16);
    p.lse = a.lse;
    p.mask = a.mask;
    p.length = a.length;
    p.score_scale = static_cast<float>(kLog2e * (a.softcap ? a.softcap : a.scale));
    p.tanh_scale = static_cast<float>(a.softcap ? a.scale / a.softcap : 0.0);
    p.group = a.heads / a.kv_heads;
    p.queries = a.queries;
    p.keys = a.keys;
    p.heads = a.heads;
    p.all_heads = a.heads * a.batch;
    p.row_tiles = (a.queries + Shape::kRows - 1) / Shape::kRows;
    const int64_t kv_heads = kL2Bytes / (4 * int64_t{a.head_dim} * (int64_t{a.keys} + 1));
    const int64_t section = (kv_heads < 1 ? 1 : kv_heads) * p.group;
    p.section_heads = section < p.all_heads ? static_cast<unsigned>(section) : p.all_heads;
    p.section_tiles = p.section_heads * p.row_tiles;
    p.counter = counter;
    if (a.dtype == DType::kFloat16) {
      start(flash_forward_sm90_kernel<__half, Shape>, p, stream);
    } else {
      start(flash_forward_sm90_kernel<__nv_bfloat16, Shape>, p, stream);
    }
  }

 private:
  template <typename Kernel>
  static void start(Kernel* kernel, const ForwardKernelParams& p, cudaStream_t stream) {
    constexpr int kShared = sizeof(ForwardShared<Shape>);
    allow_shared_memory(kernel, kShared);
    const unsigned tiles = p.row_tiles * p.all_heads, sms = device_properties().num_sms;
    launch_waiting(kernel, tiles < sms ? tiles : sms, Shape::kThreads, kShared, stream, p);
  }
};

}  // namespace torchtune_fused
