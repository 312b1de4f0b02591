// Gradients of attention of many queries on Hopper: copies, products and the softmax's derivative
// overlap (Shah et al., FlashAttention-3, 2024, https://arxiv.org/abs/2407.08608).
//
// Grid: a block for each tile of 128 keys of each key head, in the order of flash_schedule.h.
// Block: a warpgroup of which one warp produces, and two warpgroups that consume, 64 keys each.
//
//   D     queries of a tile
//   64    128
//   128   64
//
// The producer finds the tiles of queries that see any of the keys, in all heads that read the key
// head, and has the copy engine load Q and dO (rings in shared memory, tiles as tma.cuh lays them
// out), with the queries' statistics.
//
// A consumer makes transposed scores S^T = K Q^T and dP^T = V dO^T, whose registers, rounded, are
// the A operands of dV += P^T dO and dK += dS^T Q: sums in registers over all tiles and heads. Only
// dS passes through shared memory, for dQ = dS K, which sums over the keys of both consumers: each
// makes half of it (half of the columns, or of the queries), a tile late, so that neither waits for
// the other. The copy engine adds it to fp32 sums in global memory, in the order of add_fragment in
// common/ptx.cuh.
//
// While dP is under way, a consumer takes the softmax; while dV is, it makes dS; while dK is, it
// keeps dQ in shared memory; and while S of the next tile is, dQ leaves.
#pragma once

#include "attention/flash_backward_sm90_producer.cuh"
#include "attention/wgmma_softmax.cuh"
#include "common/launch.h"
#include "common/vec.cuh"
#include "common/wgmma.cuh"

namespace torchtune_fused {

template <typename T, typename Shape>
struct BackwardConsumer {
  static constexpr int kHeadDim = Shape::kHeadDim, kKeys = Shape::kKeys;
  static constexpr int kQueries = Shape::kQueries;
  using Scores = Wgmma<T, kQueries>;    // S^T and dP^T, [64 keys, queries]
  using GradKeys = Wgmma<T, kHeadDim>;  // dK and dV, [64 keys, D]
  using GradQueries = Wgmma<T, 64>;     // this consumer's half of dQ, [64 queries, 64]

  const BackwardKernelParams& p;
  BackwardShared<Shape>& shared;
  KeyTile keys;
  int consumer;
  int thread;          // within the warpgroup
  unsigned tiles = 0;  // before this one

  float s[kQueries / 2], grad_p[kQueries / 2];
  float grad_k[kHeadDim / 2], grad_v[kHeadDim / 2], grad_q[32];
  uint32_t probabilities[kQueries / 16][4], grad_scores[kQueries / 16][4];

  // Uniform, so that the addresses of products are, too.
  template <int kSlots>
  struct UniformPlace : Place<kSlots> {
    __device__ __forceinline__ explicit UniformPlace(unsigned n) : Place<kSlots>(n) {
      this->slot = __shfl_sync(~0u, this->slot, 0);
    }
  };
  using Slot = UniformPlace<Shape::kSlots>;  // of the n-th tile
  using ScoresSlot = UniformPlace<2>;        // of dS of the tile before the n-th

  __device__ __forceinline__ int warp() const { return thread / 32; }
  __device__ __forceinline__ int lane() const { return thread % 32; }

  // By one lane of every warp that is done with the slot.
  __device__ __forceinline__ void release(Barrier& barrier) {
    if (lane() == 0) arrive(barrier);
  }

  // Waits for the queries of the next tile. Only the lane that arrives for its warp reads the note
  // that is meant: racecheck believes only those to be done that arrive themselves.
  __device__ __forceinline__ BackwardTile wait_for_tile() {
    const Slot at(tiles);
    wait(shared.q_full[at.slot], at.parity);
    return __shfl_sync(~0u, shared.tile[lane() == 0 ? at.slot : Shape::kSlots], 0);
  }

  // ---- Products ---------------------------------------------------------------------------------

  // d = the consumer's rows of `rows`, K or V, by a tile of queries.
  __device__ __forceinline__ void start_transposed(float (&d)[kQueries / 2],
                                                   const unsigned char* rows,
                                                   const unsigned char* queries) {
    const uint64_t a = row_operand(shared_address(rows) + consumer * 64 * 128);
    const uint64_t b = row_operand(shared_address(queries));
    pin(d);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const int piece = i / 4, within = i % 4 * 32;
      Scores::rows(d, a + (piece * kKeys * 128 + within) / 16,
                   b + (piece * kQueries * 128 + within) / 16, i > 0);
    }
    wgmma_commit();
  }

  // d += a by the rows of a tile of queries.
  __device__ __forceinline__ void start_sum(float (&d)[kHeadDim / 2],
                                            uint32_t (&a)[kQueries / 16][4],
                                            const unsigned char* queries) {
    const uint64_t b = column_operand(shared_address(queries), kQueries * 128);
    pin(d);
    pin(a);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kQueries / 16; ++i) GradKeys::columns(d, a[i], b + i * 2048 / 16);
    wgmma_commit();
  }

  // Of the tile before.
  __device__ __forceinline__ void start_grad_q() {
    constexpr bool kHalfColumns = kHeadDim == 128;
    const ScoresSlot at(tiles);
    wait(shared.grad_scores_full[at.slot], at.parity);
    const uint64_t a = row_operand(shared_address(shared.grad_scores[at.slot]) +
                                   (kHalfColumns ? 0 : consumer * 64 * 128));
    const uint64_t b = column_operand(
        shared_address(shared.k) + (kHalfColumns ? consumer * kKeys * 128 : 0), kKeys * 128);
    pin(grad_q);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      const int piece = i / 4, within = i % 4 * 32;
      GradQueries::rows_by_columns(grad_q, a + (piece * kQueries * 128 + within) / 16,
                                   b + i * 2048 / 16, i > 0);
    }
    wgmma_commit();
  }

  // ---- Masks ------------------------------------------------------------------------------------

  // Notes in shared memory, to spare registers, who sees the keys of this warp.
  __device__ __forceinline__ void note_seen() {
    if (lane() < 16) {
      const int i = 64 * consumer + 16 * warp() + lane(), key = keys.first + i;
      const FlashAttentionParams& forward = p.arguments.forward;
      shared.seen_by[i] =
          key < forward.keys ? queries_of_key(forward, keys.batch, key) : Range{0, 0};
    }
    __syncwarp();
  }

  __device__ __forceinline__ void hide_scores(int first_row) {
    const FlashAttentionParams& forward = p.arguments.forward;
    const int head = first_row / p.workspace.padded_queries;
    const int row = 64 * consumer + 16 * warp() + lane() / 4;
    const int query = first_row % p.workspace.padded_queries + lane() % 4 * 2;
    KeyRange seen[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Range range = shared.seen_by[row + 8 * i];
      seen[i] = {range.begin - query, range.end - query};
    }
    hide_outside(s, seen);
    const AttentionMask& mask = forward.mask;
    const int first_key = keys.first + 64 * consumer + 16 * warp();
    if (!mask.bits || first_key >= forward.keys) return;
    const uint32_t* words = mask.bits + keys.batch * mask.bits_batch_stride +
                            head * mask.bits_head_stride + first_key / 32;
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t at = min(query + 8 * j + e, forward.queries - 1);
        const uint32_t word =
            words[at * mask.bits_row_stride] >> (first_key % 32 + lane() / 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = s[4 * j + 2 * i + e];
          score = word >> 8 * i & 1 ? score : -INFINITY;
        }
      }
    }
  }

  // ---- Steps ------------------------------------------------------------------------------------

  // P = exp(S - lse), rounded at once: fp32 copies would not fit into the registers.
  __device__ __forceinline__ void apply_softmax(const RowStats* stats) {
    const uint32_t at = shared_address(stats + lane() % 4 * 2);
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
      const uint4 words = load_shared_16(at + j * 8 * sizeof(RowStats));
      const float lse[2] = {__uint_as_float(words.x), __uint_as_float(words.z)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* pair = s + 4 * j + 2 * i;
        probabilities[j / 2][j % 2 * 2 + i] =
            pack<T>(exp2_approx(fmaf(pair[0], p.score_scale, -lse[0])),
                    exp2_approx(fmaf(pair[1], p.score_scale, -lse[1])));
      }
    }
  }

  // Where this lane stores its row of the matrices of the first 16 queries.
  __device__ __forceinline__ uint32_t address_of_grad_scores(int slot) {
    const int row = lane() / 16 * 8 + lane() % 8, column = 2 * warp() + lane() / 8 % 2;
    return shared_address(shared.grad_scores[slot]) + consumer * kQueries * 128 + row * 128 +
           (column ^ row % 8) * 16;
  }

  // dS = P (dP - delta), in registers and, transposed, in shared memory.
  __device__ __forceinline__ void make_grad_scores(const RowStats* stats) {
    const uint32_t at = shared_address(stats + lane() % 4 * 2);
    const ScoresSlot slot(tiles + 1);
    const uint32_t to = address_of_grad_scores(slot.slot);
    wait(shared.grad_scores_empty[slot.slot], slot.parity ^ 1);
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
      const uint4 words = load_shared_16(at + j * 8 * sizeof(RowStats));
      const float delta[2] = {__uint_as_float(words.y), __uint_as_float(words.w)};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* pair = grad_p + 4 * j + 2 * i;
        const int fragment = j % 2 * 2 + i;
        const float2 probability = unpack<T>(probabilities[j / 2][fragment]);
        grad_scores[j / 2][fragment] = pack<T>(probability.x * (pair[0] - delta[0]),
                                               probability.y * (pair[1] - delta[1]));
      }
      if (j % 2) store_matrix_x4_transposed(to + j / 2 * 2048, grad_scores[j / 2]);
    }
  }

  // Once products are under way that don't need it, since the fence takes its time.
  __device__ __forceinline__ void pass_grad_scores() {
    fence_async();
    __syncwarp();
    release(shared.grad_scores_full[ScoresSlot(tiles + 1).slot]);
  }

  // Before the first tile: zeros, which add nothing to dQ.
  __device__ __forceinline__ void clear_grad_scores() {
    const uint32_t to = address_of_grad_scores(0);
#pragma unroll
    for (int j = 0; j < kQueries / 16; ++j) store_shared_16(to + j * 2048, {});
    fence_async();
    __syncwarp();
    release(shared.grad_scores_full[0]);
  }

  __device__ __forceinline__ void keep_grad_q() {
    if (lane() == 0) wait_for_stores();  // of the tile before, from this place
    __syncwarp();
    const uint32_t to = shared_address(shared.grad_q[4 * consumer + warp()]) + lane() * 16;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* d = grad_q + 4 * j;
      store_shared_16(to + j * 512, d[0], d[1], d[2], d[3]);
    }
  }

  // Adds what was kept to the sums. The fence waits for what was stored, so some time should be
  // between the two.
  __device__ __forceinline__ void add_grad_q(BackwardTile tile) {
    constexpr bool kHalfColumns = kHeadDim == 128;
    forget(tile, thread, consumer, keys.batch);
    const int64_t heads = int64_t{keys.batch} * p.arguments.forward.heads;
    const int64_t row = heads * p.workspace.padded_queries + (tile & ~1) + 16 * warp() +
                        (kHalfColumns ? 0 : 64 * consumer);
    float* sums = p.workspace.grad_q + row * kHeadDim + (kHalfColumns ? 64 * 16 * consumer : 0);
    fence_async();
    __syncwarp();
    if (lane() == 0) {
      add_floats(sums, shared.grad_q[4 * consumer + warp()], sizeof(shared.grad_q[0]));
    }
  }

  // From the scores of a tile, which are under way, to dV and dS.
  __device__ __forceinline__ void differentiate(BackwardTile tile) {
    forget(thread, consumer, keys.batch, keys.first, tiles);
    const Slot at(tiles);
    wgmma_wait<1>(grad_k);  // of the tile before, whose registers are needed
    if (tiles > 0) release(shared.q_empty[Slot(tiles - 1).slot]);
    wait(shared.grad_out_full[at.slot], at.parity);
    start_transposed(grad_p, shared.v, shared.grad_out[at.slot]);
    wgmma_wait<1>(s);
    if (tile & 1) hide_scores(tile - 1);
    apply_softmax(shared.stats[at.slot]);
    start_sum(grad_v, probabilities, shared.grad_out[at.slot]);
    wgmma_wait<1>(grad_p);
    make_grad_scores(shared.stats[at.slot]);
    wgmma_wait<0>(grad_v);
    release(shared.grad_out_empty[at.slot]);
  }

  __device__ __forceinline__ void store(void* tensor, const int64_t (&stride)[3],
                                        const float (&d)[kHeadDim / 2], float factor) {
    T* target = static_cast<T*>(tensor) + keys.batch * stride[0] + keys.kv_head * stride[1];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = keys.first + 64 * consumer + 16 * warp() + 8 * i + lane() / 4;
      if (row >= p.arguments.forward.keys) continue;
#pragma unroll
      for (int j = 0; j < kHeadDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(target + row * stride[2] + j * 8 + lane() % 4 * 2) =
            pack<T>(d[4 * j + 2 * i] * factor, d[4 * j + 2 * i + 1] * factor);
      }
    }
  }

  __device__ __forceinline__ void run() {
    note_seen();
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) grad_k[i] = grad_v[i] = 0.f;
    clear_grad_scores();
    BackwardTile tile = wait_for_tile(), last_tile = tile;
    if (tile >= 0) {
      start_transposed(s, shared.k, shared.q[0]);
      differentiate(tile);
      while (true) {
        start_grad_q();
        start_sum(grad_k, grad_scores, shared.q[Slot(tiles).slot]);
        pass_grad_scores();
        wgmma_wait<1>(grad_q);
        release(shared.grad_scores_empty[ScoresSlot(tiles).slot]);
        keep_grad_q();
        ++tiles;
        const BackwardTile next_tile = wait_for_tile();
        if (next_tile < 0) break;
        start_transposed(s, shared.k, shared.q[Slot(tiles).slot]);
        add_grad_q(last_tile);
        last_tile = tile;
        tile = next_tile;
        differentiate(tile);
      }
      add_grad_q(last_tile);
      start_grad_q();
      wgmma_wait<0>(grad_q);
      pin(grad_k);
      keep_grad_q();
      add_grad_q(tile);
      if (lane() == 0) wait_for_stores();
    }
    const FlashAttentionBackwardParams& a = p.arguments;
    store(a.grad_v, a.grad_v_stride, grad_v, 1.f);
    store(a.grad_k, a.grad_k_stride, grad_k, static_cast<float>(a.forward.scale));
  }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    flash_backward_sm90_kernel(const __grid_constant__ BackwardKernelParams p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<BackwardShared<Shape>*>(memory);
  constexpr int kConsumerWarps = 4 * Shape::kConsumers;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

  if (threadIdx.x == 0) {
    prefetch_map(p.q);
    prefetch_map(p.k);
    prefetch_map(p.v);
    prefetch_map(p.grad_out);
    prefetch_map(p.stats);
    for (int i = 0; i < Shape::kSlots; ++i) {
      init(shared.q_full[i], 1);
      init(shared.q_empty[i], kConsumerWarps);
      init(shared.grad_out_full[i], 1);
      init(shared.grad_out_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < 2; ++i) {
      init(shared.grad_scores_full[i], kConsumerWarps);
      init(shared.grad_scores_empty[i], kConsumerWarps);
    }
    fence_init();
  }
  launch_dependents();
  wait_for_grid();
  __syncthreads();

  if (warp < 4) {
    give_up_registers<Shape::kProducerRegisters>();
    if (warp == 0) produce<Shape>(p, shared);
  } else {
    take_registers<Shape::kConsumerRegisters>();
    const KeyTile keys(p, Shape::kKeys);
    BackwardConsumer<T, Shape>{p, shared, keys, warp / 4 - 1, static_cast<int>(threadIdx.x % 128)}
        .run();
  }
}

// Instantiated once per head dimension, each in a file of its own.
template <int kHeadDim>
struct FlashBackwardSm90 {
  using Shape = BackwardShape<kHeadDim>;

  static void launch(const FlashAttentionBackwardParams& a,
                     const FlashBackwardWorkspace& workspace, cudaStream_t stream) {
    const FlashAttentionParams& f = a.forward;
    const auto map = [&](const void* data, const int64_t (&stride)[3], int heads, int rows,
                         int tile_rows) {
      return tile_map(data, stride, f.batch, heads, rows, kHeadDim, tile_rows, f.dtype);
    };
    const int key_tiles = (f.keys + Shape::kKeys - 1) / Shape::kKeys;
    const BackwardKernelParams p = {
        map(f.q, f.q_stride, f.heads, f.queries, Shape::kQueries),
        map(f.k, f.k_stride, f.kv_heads, f.keys, Shape::kKeys),
        map(f.v, f.v_stride, f.kv_heads, f.keys, Shape::kKeys),
        map(a.grad_out, a.grad_out_stride, f.heads, f.queries, Shape::kQueries),
        row_map(&workspace.stats->lse, workspace.rows(a) / Shape::kQueries, 2 * Shape::kQueries),
        a,
        workspace,
        Schedule::make(int64_t{f.batch} * f.kv_heads, key_tiles, 1,
                       int64_t{8} * f.queries * kHeadDim, 1, 1),
        static_cast<float>(f.scale) * kLog2E};
    if (f.dtype == DType::kFloat16) {
      start(flash_backward_sm90_kernel<__half, Shape>, p, stream);
    } else {
      start(flash_backward_sm90_kernel<__nv_bfloat16, Shape>, p, stream);
    }
  }

 private:
  template <typename Kernel>
  static void start(Kernel* kernel, const BackwardKernelParams& p, cudaStream_t stream) {
    constexpr int kShared = sizeof(BackwardShared<Shape>);
    allow_shared_memory(kernel, kShared);
    launch_waiting(kernel, p.schedule.blocks(), Shape::kThreads, kShared, stream, p);
  }
};

}  // namespace torchtune_fused
