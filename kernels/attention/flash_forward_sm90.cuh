// Attention of many queries on Hopper: exact, with an online softmax (Dao, FlashAttention-2, 2023),
// and with copies, products and softmax that overlap (Shah et al., FlashAttention-3, 2024,
// https://arxiv.org/abs/2407.08608).
//
// Grid: a block per SM, which stays and takes tile after tile of kRows queries of a head, heaviest
// first, from a counter that all blocks share. Block: a warpgroup of which one warp produces, and
// warpgroups that consume, 64 queries each.
//
//   D     queries   keys   slots: Q, K, V   shared memory
//   64    192       128    2, 3, 3          168 KB
//   128   128       128    2, 2, 2          224 KB
//
// The producer finds the blocks of 128 keys that any query of the tile sees, from the last to the
// first, and has the copy engine load them into rings in shared memory, K and V apart, tiles as
// tma.cuh lays them out. With each block goes a note of what it needs: most are seen in whole by
// every query, and only the others pay for masks.
//
// A consumer holds in registers the scores S = Q K^T of a block, the probabilities P of the block
// before, and O. A step starts S of the next block and O += P V of the present one, and takes the
// softmax of S while O is under way. Consumers take turns to start, so that the softmax of one runs
// beside the products of the others. O leaves through shared memory, 16 rows of a warp at a time.
#pragma once

#include "attention/flash_forward_sm90_producer.cuh"
#include "attention/wgmma_softmax.cuh"
#include "common/launch.h"
#include "common/vec.cuh"
#include "common/wgmma.cuh"

namespace torchtune_fused {

// Turns among the consumers to start their products: consumer i waits at named barrier 1 + i, which
// opens when all others have been there.
template <int kConsumers>
struct Turns {
  static constexpr int kThreads = 128 * kConsumers;

  static __device__ __forceinline__ void arrive(int consumer) {
    asm volatile("bar.arrive %0, %1;" ::"r"(1 + consumer), "n"(kThreads) : "memory");
  }

  static __device__ __forceinline__ void begin(int consumer) {
#pragma unroll
    for (int other = 0; other < kConsumers; ++other) {
      if (other < consumer) arrive(other);
    }
  }

  static __device__ __forceinline__ void take(int consumer) {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + consumer), "n"(kThreads) : "memory");
  }

  static __device__ __forceinline__ void pass(int consumer) {
#pragma unroll
    for (int i = 1; i < kConsumers; ++i) {
      const int other = consumer + i;
      arrive(other < kConsumers ? other : other - kConsumers);
    }
  }
};

// Tells the compiler that all lanes of the warp hold the same, so that branches on it are uniform.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

template <typename T, typename Shape>
struct Consumer {
  static constexpr int kHeadDim = Shape::kHeadDim, kKeys = Shape::kKeys;
  using Scores = Wgmma<T, kKeys>;
  using Output = Wgmma<T, kHeadDim>;
  using Turn = Turns<Shape::kConsumers>;

  const ForwardKernelParams& p;
  ForwardShared<Shape>& shared;
  const int consumer, warp, lane;  // the warp within the warpgroup
  unsigned tiles = 0;              // before this one
  unsigned blocks = 0;  // of keys whose scores are there; the values of the last are still to come

  float s[kKeys / 2];
  float o[kHeadDim / 2];
  uint32_t probabilities[kKeys / 16][4];
  Softmax softmax;

  __device__ __forceinline__ Place<Shape::kQuerySlots> queries() const {
    return Place<Shape::kQuerySlots>(tiles);
  }
  __device__ __forceinline__ Place<Shape::kSlots> keys() const {
    return Place<Shape::kSlots>(blocks);
  }
  __device__ __forceinline__ Place<Shape::kSlots> values() const {
    return Place<Shape::kSlots>(blocks - 1);
  }

  // By one lane of every warp that is done with the slot.
  __device__ __forceinline__ void release(Barrier& barrier) {
    if (lane == 0) arrive(barrier);
  }

  // ---- What comes from the producer -------------------------------------------------------------

  __device__ __forceinline__ QueryTile tile() const {
    const QueryTile& tile = shared.tile[queries().slot];
    return {uniform(tile.batch), uniform(tile.head), uniform(tile.row),
            uniform(tile.sees_keys) != 0};
  }

  __device__ __forceinline__ QueryTile next_tile() {
    wait(shared.q_full[queries().slot], queries().parity);
    return tile();
  }

  // `never` is false.
  __device__ __forceinline__ KeyBlock next_block(bool never = false) {
    const Place<Shape::kSlots> k = keys();
    wait(shared.k_full[k.slot], k.parity ^ never);
    const KeyBlock& block = shared.block[k.slot];
    return {uniform(block.first), uniform(block.general) != 0, uniform(block.last) != 0};
  }

  // ---- Products ---------------------------------------------------------------------------------

  __device__ __forceinline__ void start_scores() {
    const uint64_t a = row_operand(shared_address(shared.q[queries().slot]) + consumer * 64 * 128);
    const uint64_t b = row_operand(shared_address(shared.k[keys().slot]));
    pin(s);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      const int piece = i / 4, within = i % 4 * 32;
      Scores::rows(s, a + (piece * Shape::kRows * 128 + within) / 16,
                   b + (piece * kKeys * 128 + within) / 16, i > 0);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void start_output() {
    const Place<Shape::kSlots> v = values();
    wait(shared.v_full[v.slot], v.parity);
    const uint64_t b = column_operand(shared_address(shared.v[v.slot]), kKeys * 128);
    pin(o);
    pin(probabilities);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      Output::columns(o, probabilities[i], b + i * 2048 / 16);
    }
    wgmma_commit();
  }

  // ---- Masks ------------------------------------------------------------------------------------

  // Notes in shared memory, to spare registers, what the rows of this warp see.
  __device__ __forceinline__ void note_seen(const QueryTile& tile) {
    const int filled = filled_keys(p);
    __syncwarp();  // all have read what the rows of the tile before saw
    if (lane < 16) {
      const int row = 64 * consumer + 16 * warp + lane;
      shared.seen[row] = visible_keys(p, filled, tile.batch, min(tile.row + row, p.queries - 1));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void hide_scores(int first_key) {
    if (p.tanh_scale != 0.f) cap_scores(s, p.tanh_scale);
    const int row = 64 * consumer + 16 * warp + lane / 4;
    const int column = first_key + lane % 4 * 2;
    KeyRange seen[2] = {shared.seen[row], shared.seen[row + 8]};
#pragma unroll
    for (KeyRange& range : seen) range = {range.first - column, range.last - column};
    hide_outside(s, seen);
    if (p.mask.bits) {
      const QueryTile& tile = shared.tile[queries().slot];
      const uint32_t* bits = p.mask.bits + tile.batch * p.mask.bits_batch_stride +
                             tile.head * p.mask.bits_head_stride + first_key / 32;
      const int words = p.mask.bits_row_stride - first_key / 32;
      const int64_t row0 = min(tile.row + row, p.queries - 1);
      const int64_t row1 = min(tile.row + row + 8, p.queries - 1);
      hide_unset<0>(s, bits + row0 * p.mask.bits_row_stride, words);
      hide_unset<1>(s, bits + row1 * p.mask.bits_row_stride, words);
    }
  }

  // Slots of the cache that are not filled may hold NaN, which a probability of 0 does not take
  // away. They can only be in the first block of a tile; the consumers clear them together.
  __device__ __forceinline__ void clear_values(int first_key) {
    if (!p.length) return;
    const int first_row = filled_keys(p) - first_key;
    if (first_row >= kKeys) return;
    const Place<Shape::kSlots> v = values();
    wait(shared.v_full[v.slot], v.parity);
    constexpr int kPieces = kHeadDim / 64 * kKeys * 8, kThreads = 128 * Shape::kConsumers;
#pragma unroll 1
    for (int i = threadIdx.x - 128; i < kPieces; i += kThreads) {
      if (i / 8 % kKeys < first_row) continue;
      store_shared_16(shared_address(shared.v[v.slot]) + 16 * i, {});
    }
    fence_async();
    asm volatile("bar.sync %0, %1;" ::"n"(1 + Shape::kConsumers), "n"(kThreads) : "memory");
  }

  // ---- Steps ------------------------------------------------------------------------------------

  __device__ __forceinline__ void keep_probabilities() {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        probabilities[i][j] = pack<T>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
      }
    }
  }

  // Scores of the first block.
  __device__ __forceinline__ void first_step(const KeyBlock& block) {
    start_scores();
    wgmma_wait<0>(s);
    release(shared.k_empty[keys().slot]);
    ++blocks;
    if (block.general) hide_scores(block.first);
    float decay[2];  // of nothing
    softmax.template update<true>(s, p.score_scale, decay);
    keep_probabilities();
    clear_values(block.first);
  }

  // Scores of `block`, output of the block before. Returns the block after it, if there is one.
  template <bool kGeneral>
  __device__ __forceinline__ KeyBlock step(const KeyBlock& block) {
    const int value_slot = values().slot;
    Turn::take(consumer);
    start_scores();
    start_output();
    Turn::pass(consumer);
    wgmma_wait<1>(s);
    release(shared.k_empty[keys().slot]);
    ++blocks;
    if (kGeneral) hide_scores(block.first);
    float decay[2];
    const bool decays = softmax.template update<kGeneral>(s, p.score_scale, decay);
    pin(s);
    // The compiler would put the softmax off until O is there. It can't before a loop that depends
    // on the result; that sums are not negative it doesn't know.
    const bool never = softmax.sum[0] + softmax.sum[1] < 0.f;
    const KeyBlock next = block.last ? block : next_block(never);
    wgmma_wait<0>(o);
    release(shared.v_empty[value_slot]);
    keep_probabilities();
    if (decays) {
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= decay[i / 2 % 2];
    }
    return next;
  }

  // Output of the last block.
  __device__ __forceinline__ void last_step() {
    start_output();
    wgmma_wait<0>(o);
    release(shared.v_empty[values().slot]);
  }

  // Stores O / sum and the log-sum-exp of this warp's 16 rows.
  __device__ __forceinline__ void store(const QueryTile& tile) {
    const int first_row = tile.row + 64 * consumer + 16 * warp;
    float* lse = p.lse + (int64_t{tile.batch} * p.heads + tile.head) * p.queries;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(softmax.sum[i]);
      const int row = first_row + lane / 4 + 8 * i;
      inverse[i] = sum > 0.f ? reciprocal(sum) : 0.f;  // a row that sees nothing gives zeros
      if (lane % 4 == 0 && row < p.queries) {
        constexpr float kLn2 = 0.6931471806f;
        lse[row] = sum > 0.f ? (softmax.max[i] * p.score_scale + __log2f(sum)) * kLn2 : 0.f;
      }
    }
    unsigned char* out = shared.out[4 * consumer + warp];
    if (lane == 0) wait_for_stores();  // of the tile before, from this place
    __syncwarp();
    const int row = lane % 16;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      uint32_t r[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        r[j] = pack<T>(o[8 * i + 2 * j] * inverse[j % 2], o[8 * i + 2 * j + 1] * inverse[j % 2]);
      }
      const int piece = 2 * i + lane / 16;  // of 16 bytes
      store_matrix_x4(
          shared_address(out) + piece / 8 * (16 * 128) + row * 128 + (piece ^ row) % 8 * 16, r);
    }
    fence_async();
    __syncwarp();
    if (lane == 0 && first_row < p.queries) {
      store_tile(p.out, tile.batch, tile.head, first_row, out);
    }
  }

  __device__ __forceinline__ void run() {
    Turn::begin(consumer);
    while (next_tile().batch >= 0) {
      softmax = Softmax();
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.f;
      if (tile().sees_keys) {
        note_seen(tile());
        KeyBlock block = next_block();
        first_step(block);
        bool more = !block.last;
        if (more) block = next_block();
        while (more) {
          more = !block.last;
          block = block.general ? step<true>(block) : step<false>(block);
        }
        last_step();
      }
      const QueryTile done = tile();
      release(shared.q_empty[queries().slot]);
      store(done);
      ++tiles;
    }
    if (lane == 0) wait_for_stores();
  }
};

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
      return tile_map(data, stride, a.batch, heads, rows, kHeadDim, tile_rows, a.dtype);
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
    const int64_t kv_heads = kL2Bytes / (2 * Shape::kRowBytes * (int64_t{a.keys} + 1));
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
    kernel<<<tiles < sms ? tiles : sms, Shape::kThreads, kShared, stream>>>(p);
    TTF_CUDA_CHECK(cudaGetLastError());
  }
};

}  // namespace torchtune_fused
