// The producer of flash_backward_sm90.cuh: one warp, which finds the tiles of queries that see the
// block's keys, and has them loaded.
#pragma once

#include "attention/flash_backward_sm90_shared.cuh"

namespace torchtune_fused {

// The keys of a block.
struct KeyTile {
  int batch, kv_head, first;

  __device__ __forceinline__ KeyTile(const BackwardKernelParams& p, int tile_keys) {
    p.schedule.locate(blockIdx.x, first, kv_head);
    first *= tile_keys;
    batch = kv_head / p.arguments.forward.kv_heads;
    kv_head %= p.arguments.forward.kv_heads;
  }
};

template <typename Shape>
__device__ __forceinline__ void produce(const BackwardKernelParams& p,
                                        BackwardShared<Shape>& shared) {
  constexpr int kQueries = Shape::kQueries, kKeys = Shape::kKeys;
  const FlashAttentionParams& forward = p.arguments.forward;
  const bool leader = threadIdx.x % 32 == 0;
  const KeyTile keys(p, kKeys);
  const int last_key = min(keys.first + kKeys, forward.keys) - 1;
  const int group = forward.heads / forward.kv_heads;
  const int begin = queries_of_key(forward, keys.batch, keys.first).begin / kQueries;
  const int end = (queries_of_key(forward, keys.batch, last_key).end + kQueries - 1) / kQueries;

  // The heads one after the other, each from the last tile to the first: blocks that start together
  // then read the same tiles at the same time, whichever keys are theirs.
  const int tiles = end - begin;
  const auto head_of = [&](int step) { return keys.kv_head * group + step / tiles; };
  const auto tile_of = [&](int step) { return end - 1 - step % tiles; };
  const auto kind_of = [&](int step) {
    const int first = tile_of(step) * kQueries;
    return kind_of_queries(forward, keys.batch, head_of(step),
                           {first, min(first + kQueries, forward.queries)},
                           {keys.first, keys.first + kKeys});
  };
  TileWalk walk(0, tiles * group, kind_of);

  for (unsigned number = 0;; ++number) {
    const VisitedTile step = walk.next();
    const Place<Shape::kSlots> at(number);
    wait(shared.q_empty[at.slot], at.parity ^ 1);
    if (!step.exists()) {
      if (leader) {
        shared.tile[at.slot] = -1;
        arrive(shared.q_full[at.slot]);
      }
      return;
    }
    const int head = head_of(step.index()), query = tile_of(step.index()) * kQueries;
    if (leader) {
      Barrier& full = shared.q_full[at.slot];
      shared.tile[at.slot] = head * p.workspace.padded_queries + query + step.partial();
      arrive_and_expect(full, sizeof(shared.q[0]) + sizeof(shared.stats[0]) +
                                  (number == 0 ? sizeof(shared.k) : 0));
      if (number == 0) load_tile(shared.k, p.k, keys.batch, keys.kv_head, keys.first, full);
      load_tile(shared.q[at.slot], p.q, keys.batch, head, query, full);
      const int64_t row =
          (int64_t{keys.batch} * forward.heads + head) * p.workspace.padded_queries + query;
      load_row(shared.stats[at.slot], p.stats, static_cast<int>(row / kQueries), full);
    }
    wait(shared.grad_out_empty[at.slot], at.parity ^ 1);
    if (leader) {
      Barrier& full = shared.grad_out_full[at.slot];
      arrive_and_expect(full,
                        sizeof(shared.grad_out[0]) + (number == 0 ? sizeof(shared.v) : 0));
      if (number == 0) load_tile(shared.v, p.v, keys.batch, keys.kv_head, keys.first, full);
      load_tile(shared.grad_out[at.slot], p.grad_out, keys.batch, head, query, full);
    }
  }
}

}  // namespace torchtune_fused
