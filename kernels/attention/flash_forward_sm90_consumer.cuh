// The consumers of flash_forward_sm90.cuh: warpgroups, each of which computes 64 queries of a tile.
#pragma once

#include <type_traits>

#include "attention/flash_forward_sm90_shared.cuh"
#include "attention/wgmma_softmax.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"

namespace torchtune_fused {

// Tells the compiler that all lanes of the warp hold the same, so that branches on it are uniform.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

template <typename T, typename Shape>
struct Consumer {
  static constexpr int kHeadDim = Shape::kHeadDim, kKeys = Shape::kKeys;
  using Scores = Wgmma<T, kKeys>;
  using Output = Wgmma<T, kHeadDim>;
  // Up to there probabilities may add up in a block: they must fit into T, their sums into fp32.
  static constexpr float kMost = std::is_same_v<T, __half> ? 0x1p15f : 0x1p60f;

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

  // By every warp that is done with the slot.
  __device__ __forceinline__ void release(Barrier& barrier) {
    __syncwarp();  // what other lanes have read comes before, too
    if (lane == 0) arrive(barrier);
  }

  // ---- Turns ------------------------------------------------------------------------------------
  // The consumers start the products of each block of keys one after another, so that the softmax
  // of one runs beside the products of the others: consumer i waits at named barrier 1 + i, which
  // opens when all others have been there.

  __device__ __forceinline__ void arrive_for_turn(int other) {
    asm volatile("bar.arrive %0, %1;" ::"r"(1 + other), "n"(128 * Shape::kConsumers) : "memory");
  }

  __device__ __forceinline__ void begin_turns() {
    if constexpr (Shape::kTurns) {
#pragma unroll
      for (int other = 0; other < Shape::kConsumers; ++other) {
        if (other < consumer) arrive_for_turn(other);
      }
    }
  }

  __device__ __forceinline__ void take_turn() {
    if constexpr (Shape::kTurns) {
      constexpr int kThreads = 128 * Shape::kConsumers;
      asm volatile("bar.sync %0, %1;" ::"r"(1 + consumer), "n"(kThreads) : "memory");
    }
  }

  __device__ __forceinline__ void pass_turn() {
    if constexpr (Shape::kTurns) {
#pragma unroll
      for (int i = 1; i < Shape::kConsumers; ++i) {
        const int other = consumer + i;
        arrive_for_turn(other < Shape::kConsumers ? other : other - Shape::kConsumers);
      }
    }
  }

  // ---- What comes from the producer -------------------------------------------------------------
  // Only the lane that arrives for its warp reads the note that is meant: racecheck believes only
  // those to be done that arrive themselves. The others read one that is never written.

  __device__ __forceinline__ QueryTile tile() const {
    const QueryTile& tile = shared.tile[lane == 0 ? queries().slot : Shape::kQuerySlots];
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
    const KeyBlock& block = shared.block[lane == 0 ? k.slot : Shape::kSlots];
    return {.notes = static_cast<unsigned>(uniform(block.notes))};
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
      const QueryTile tile = this->tile();
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
    const Place<Shape::kSlots> v = keys();
    wait(shared.v_full[v.slot], v.parity);
    constexpr int kPieces = Shape::kPieces * kKeys * 8, kThreads = 128 * Shape::kConsumers;
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

  __device__ __forceinline__ void scale_output(const float (&decay)[2]) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= decay[i / 2 % 2];
  }

  // The scores of this warp's rows once more, by instructions that need no other warp.
  __device__ __forceinline__ void repeat_scores() {
    const auto address = [](const unsigned char* tile, int rows, int row, int column) {
      return shared_address(tile) + column / 8 * rows * 128 + row * 128 + (column ^ row) % 8 * 16;
    };
#pragma unroll
    for (float& score : s) score = 0.f;
#pragma unroll 1
    for (int i = 0; i < kHeadDim / 16; ++i) {
      uint32_t a[4];
      load_matrix_x4(a, address(shared.q[queries().slot], Shape::kRows,
                                64 * consumer + 16 * warp + lane % 16, 2 * i + lane / 16));
#pragma unroll
      for (int j = 0; j < kKeys / 8; j += 2) {
        uint32_t b[4];
        load_matrix_x4(b, address(shared.k[keys().slot], kKeys, 8 * j + lane / 16 * 8 + lane % 8,
                                  2 * i + lane / 8 % 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* at = s + 4 * (j + half);
          float d[4] = {at[0], at[1], at[2], at[3]};
          mma_16x8x16<T>(d, a[0], a[1], a[2], a[3], b[2 * half], b[2 * half + 1]);
#pragma unroll
          for (int e = 0; e < 4; ++e) at[e] = d[e];
        }
      }
    }
  }

  // Scores of a tile's first block, or of one that follows blocks that this consumer doesn't see.
  __device__ __forceinline__ void first_step(const KeyBlock& block) {
    take_turn();
    start_scores();
    pass_turn();
    wgmma_wait<0>(s);
    release(shared.k_empty[keys().slot]);
    ++blocks;
    if (block.general(consumer)) hide_scores(block.number() * kKeys);
    float decay[2];
    if (softmax.template update<true>(s, p.score_scale, decay)) scale_output(decay);
    keep_probabilities();
  }

  // Scores of `block`, output of the block before. Returns the block after it, if there is one.
  template <bool kGeneral>
  __device__ __forceinline__ KeyBlock step(const KeyBlock& block) {
    const int key_slot = keys().slot, value_slot = values().slot;
    take_turn();
    start_scores();
    start_output();
    pass_turn();
    wgmma_wait<1>(s);
    float decay[2];
    bool decays = false, never = false;
    if constexpr (kGeneral) {
      release(shared.k_empty[key_slot]);
      hide_scores(block.number() * kKeys);
      decays = softmax.template update<true>(s, p.score_scale, decay);
      pin(s);
      // The compiler would put the softmax off until O is there. It can't before a loop that
      // depends on the result; that sums are not negative it doesn't know.
      never = softmax.sum[0] + softmax.sum[1] < 0.f;
    } else {
      if (!softmax.update_boldly(s, p.score_scale, kMost)) {
        repeat_scores();
        decays = softmax.template update<false>(s, p.score_scale, decay);
      }
      release(shared.k_empty[key_slot]);
    }
    ++blocks;
    const KeyBlock next = block.last() ? block : next_block(never);
    wgmma_wait<0>(o);
    release(shared.v_empty[value_slot]);
    keep_probabilities();
    if (decays) scale_output(decay);
    return next;
  }

  // A block that this consumer doesn't see. Its values must have come before they are released:
  // only then is the slot theirs.
  __device__ __forceinline__ void skip() {
    take_turn();
    pass_turn();
    const Place<Shape::kSlots> place = keys();
    release(shared.k_empty[place.slot]);
    wait(shared.v_full[place.slot], place.parity);
    release(shared.v_empty[place.slot]);
    ++blocks;
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
    const int row = lane % 16;
#pragma unroll
    for (int piece = 0; piece < Shape::kPieces; ++piece) {
      unsigned char* out = shared.out[4 * consumer + warp][piece % Shape::kOutSlots];
      if (lane == 0) wait_for_stores<Shape::kOutSlots - 1>();  // from this place
      __syncwarp();
#pragma unroll
      for (int i = 4 * piece; i < kHeadDim / 16 && i < 4 * piece + 4; ++i) {
        uint32_t r[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          r[j] = pack<T>(o[8 * i + 2 * j] * inverse[j % 2], o[8 * i + 2 * j + 1] * inverse[j % 2]);
        }
        const int column = 2 * i + lane / 16;  // of 16 bytes
        store_matrix_x4(shared_address(out) + row * 128 + (column ^ row) % 8 * 16, r);
      }
      fence_async();
      __syncwarp();
      if (lane == 0 && first_row < p.queries) {
        store_piece(p.out, tile.batch, tile.head, first_row, 64 * piece, out);
      }
    }
  }

  __device__ __forceinline__ void run() {
    begin_turns();
    while (next_tile().batch >= 0) {
      softmax = Softmax();
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.f;
      if (tile().sees_keys) take_blocks();
      const QueryTile done = tile();
      release(shared.q_empty[queries().slot]);
      store(done);
      ++tiles;
    }
    if (lane == 0) wait_for_stores();
  }

  __device__ __forceinline__ void take_blocks() {
    note_seen(tile());
    KeyBlock block = next_block();
    clear_values(block.number() * kKeys);
    bool ahead = false;  // whether probabilities still wait for their values
    for (bool more = true; more;) {
      more = !block.last();
      if (ahead && block.seen(consumer)) {
        block = block.general(consumer) ? step<true>(block) : step<false>(block);
        continue;
      }
      if (ahead) last_step();
      ahead = block.seen(consumer);
      if (ahead) first_step(block); else skip();
      if (more) block = next_block();
    }
    if (ahead) last_step();
  }
};

}  // namespace torchtune_fused
