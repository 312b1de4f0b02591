// The producer of flash_forward_sm90.cuh: one warp, which finds what is to be computed and has it
// loaded.
#pragma once

#include "attention/flash_forward_sm90_shared.cuh"

namespace torchtune_fused {

// Of 32 blocks of keys: which are to be loaded, and which of these need the general step.
struct BlockSet {
  uint32_t present, general;
};

// Each lane examines one block; `any` are the keys that any query of the tile may see, and `every`
// those that every one may see.
template <typename Shape>
__device__ __forceinline__ BlockSet examine_blocks(const ForwardKernelParams& p,
                                                   const QueryTile& tile, KeyRange any,
                                                   KeyRange every, int first_block) {
  const AttentionMask& mask = p.mask;
  const int first = (first_block + threadIdx.x % 32) * Shape::kKeys, last = first + Shape::kKeys;
  bool present = first < any.last && last > any.first;
  bool general = first < every.first || last > every.last || p.tanh_scale != 0.f;
  if (mask.tile_kinds && present) {
    const unsigned char* kinds = mask.tile_kinds + tile.batch * mask.kinds_batch_stride +
                                 tile.head * mask.kinds_head_stride;
    const int last_row = min(tile.row + Shape::kRows, p.queries) - 1;
    const int last_column = min((last - 1) / kMaskTile, mask.kinds_row_stride - 1);
    present = false;
#pragma unroll 1
    for (int row = tile.row / kMaskTile; row <= last_row / kMaskTile; ++row) {
#pragma unroll 1
      for (int column = first / kMaskTile; column <= last_column; ++column) {
        const unsigned char kind = kinds[int64_t{row} * mask.kinds_row_stride + column];
        present |= kind != kTileEmpty;
        general |= kind != kTileFull;
      }
    }
  }
  return {__ballot_sync(~0u, present), __ballot_sync(~0u, general)};
}

// Tiles of a section of heads, the last rows (under a causal mask the heaviest) of all its heads
// first.
template <typename Shape>
__device__ __forceinline__ QueryTile query_tile(const ForwardKernelParams& p, unsigned index) {
  const unsigned first_head = index / p.section_tiles * p.section_heads;
  const unsigned heads = min(p.section_heads, p.all_heads - first_head);
  const unsigned in_section = index % p.section_tiles;
  const unsigned head = first_head + in_section % heads, row_tile = in_section / heads;
  return {static_cast<int>(head / p.heads), static_cast<int>(head % p.heads),
          static_cast<int>((p.row_tiles - 1 - row_tile) * Shape::kRows), false};
}

template <typename Shape>
__device__ __forceinline__ void produce(const ForwardKernelParams& p,
                                        ForwardShared<Shape>& shared) {
  using QueryPlace = Place<Shape::kQuerySlots>;
  using KeyPlace = Place<Shape::kSlots>;
  const bool leader = threadIdx.x % 32 == 0;
  unsigned tiles = 0, blocks = 0;  // sent so far; blocks of keys

  for (unsigned index = blockIdx.x; index < p.row_tiles * p.all_heads;) {
    unsigned next_index = 0;
    if (leader) next_index = gridDim.x + atomicAdd(&p.counter->next, 1u);
    QueryTile tile = query_tile<Shape>(p, index);
    const int filled = filled_keys(p), kv_head = tile.head / p.group;
    const KeyRange top = visible_keys(p, filled, tile.batch, tile.row);
    const KeyRange bottom =
        visible_keys(p, filled, tile.batch, min(tile.row + Shape::kRows, p.queries) - 1);
    const KeyRange any = {top.first, bottom.last}, every = {bottom.first, top.last};

    // Goes down the blocks of keys: `set` holds what is left of the 32 from block `group` on.
    const int lowest = any.first / Shape::kKeys;
    int group = any.last > 0 ? (any.last - 1) / Shape::kKeys / 32 * 32 : 0;
    BlockSet set = examine_blocks<Shape>(p, tile, any, every, group);
    const auto find_block = [&] {
      while (!set.present && group > lowest) {
        group -= 32;
        set = examine_blocks<Shape>(p, tile, any, every, group);
      }
      return set.present != 0;
    };

    tile.sees_keys = find_block();
    const QueryPlace q(tiles++);
    wait(shared.q_empty[q.slot], q.parity ^ 1);
    if (leader) {
      shared.tile[q.slot] = tile;
      if (tile.sees_keys) {
        arrive_and_expect(shared.q_full[q.slot], sizeof(shared.q[0]));
        load_tile(shared.q[q.slot], p.q, tile.batch, tile.head, tile.row, shared.q_full[q.slot]);
      } else {
        arrive(shared.q_full[q.slot]);
      }
    }

    // K of a block goes ahead of V of the block before, as the consumers want them.
    const auto load_values = [&](unsigned number) {
      const KeyPlace v(number);
      wait(shared.v_empty[v.slot], v.parity ^ 1);
      if (leader) {
        arrive_and_expect(shared.v_full[v.slot], sizeof(shared.v[0]));
        load_tile(shared.v[v.slot], p.v, tile.batch, kv_head, shared.block[v.slot].first,
                  shared.v_full[v.slot]);
      }
    };
    for (bool more = tile.sees_keys, first = true; more; first = false) {
      const int i = 31 - __clz(set.present);
      KeyBlock block;
      block.first = (group + i) * Shape::kKeys;
      block.general = set.general >> i & 1;
      set.present ^= 1u << i;
      more = find_block();
      block.last = !more;
      const KeyPlace k(blocks);
      wait(shared.k_empty[k.slot], k.parity ^ 1);
      if (leader) {
        shared.block[k.slot] = block;
        arrive_and_expect(shared.k_full[k.slot], sizeof(shared.k[0]));
        load_tile(shared.k[k.slot], p.k, tile.batch, kv_head, block.first, shared.k_full[k.slot]);
      }
      if (!first) load_values(blocks - 1);
      ++blocks;
    }
    if (tile.sees_keys) load_values(blocks - 1);
    index = __shfl_sync(~0u, next_index, 0);
  }

  const QueryPlace q(tiles);
  wait(shared.q_empty[q.slot], q.parity ^ 1);
  if (leader) {
    shared.tile[q.slot].batch = -1;
    arrive(shared.q_full[q.slot]);
    if (atomicInc(&p.counter->finished, gridDim.x - 1) == gridDim.x - 1) p.counter->next = 0;
  }
}

}  // namespace torchtune_fused
