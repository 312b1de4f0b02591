// The producer of flash_forward_sm90.cuh: one warp, which finds what is to be computed and has it
// loaded.
#pragma once

#include "attention/flash_forward_sm90_shared.cuh"

namespace torchtune_fused {

// Of 32 blocks of keys: which are to be loaded, and the notes of this lane's.
struct BlockSet {
  uint32_t present;
  unsigned notes;
};

// Notes what the consumers may see, each one and all together.
template <typename Shape>
__device__ __forceinline__ KeyRange note_sight(const ForwardKernelParams& p, const QueryTile& tile,
                                               ForwardShared<Shape>& shared) {
  const int lane = threadIdx.x % 32, row = tile.row + 64 * lane;
  KeyRange any = {};
  __syncwarp();  // all have read what was noted of the tile before
  if (lane < Shape::kConsumers) {
    Sight sight = {};
    if (row < p.queries) {
      const int filled = filled_keys(p);
      const KeyRange top = visible_keys(p, filled, tile.batch, row);
      const KeyRange bottom = visible_keys(p, filled, tile.batch, min(row + 64, p.queries) - 1);
      sight = {{top.first, bottom.last}, {bottom.first, top.last}};
    }
    shared.sight[lane] = sight;
    any = sight.any;
  }
  __syncwarp();
  return {__shfl_sync(~0u, any.first, 0), __reduce_max_sync(~0u, any.last)};
}

// Each lane examines one block.
template <typename Shape>
__device__ __forceinline__ BlockSet examine_blocks(const ForwardKernelParams& p,
                                                   const QueryTile& tile,
                                                   const ForwardShared<Shape>& shared,
                                                   int first_block) {
  const AttentionMask& mask = p.mask;
  const int first = (first_block + threadIdx.x % 32) * Shape::kKeys, last = first + Shape::kKeys;
  unsigned notes = 0;
#pragma unroll 1
  for (int consumer = 0; consumer < Shape::kConsumers; ++consumer) {
    const auto& [any, every] = shared.sight[consumer];
    bool seen = first < any.last && last > any.first;
    bool general = first < every.first || last > every.last || p.tanh_scale != 0.f;
    if (mask.tile_kinds && seen) {
      const unsigned char* kinds = mask.tile_kinds + tile.batch * mask.kinds_batch_stride +
                                   tile.head * mask.kinds_head_stride +
                                   int64_t{tile.row / kMaskTile + consumer} * mask.kinds_row_stride;
      const int last_column = min((last - 1) / kMaskTile, mask.kinds_row_stride - 1);
      seen = false;
#pragma unroll 1
      for (int column = first / kMaskTile; column <= last_column; ++column) {
        seen |= kinds[column] != kTileEmpty;
        general |= kinds[column] != kTileFull;
      }
    }
    if (seen) notes |= KeyBlock::kSeen << consumer;
    if (seen && general) notes |= KeyBlock::kGeneral << consumer;
  }
  return {__ballot_sync(~0u, notes & KeyBlock::kSeenByAny), notes};
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

template <int kRows, int kPieces>
__device__ __forceinline__ void load(unsigned char* shared, const CUtensorMap& map, int batch,
                                     int head, int row, Barrier& barrier) {
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    load_piece(shared + i * kRows * 128, map, batch, head, row, 64 * i, barrier);
  }
}

template <typename Shape>
__device__ __forceinline__ void produce(const ForwardKernelParams& p,
                                        ForwardShared<Shape>& shared) {
  using QueryPlace = Place<Shape::kQuerySlots>;
  using KeyPlace = Place<Shape::kSlots>;
  const bool leader = threadIdx.x % 32 == 0;
  unsigned tiles = 0, blocks = 0, values = 0;  // sent so far; blocks of keys, and of values

  // K of a block goes ahead of V of the block before, as the consumers want them.
  const auto load_values_until = [&](unsigned end) {
    if (values == end) return;
    const KeyPlace v(values++);
    wait(shared.v_empty[v.slot], v.parity ^ 1);
    if (leader) {
      const KeyBlock& block = shared.block[v.slot];
      arrive_and_expect(shared.v_full[v.slot], sizeof(shared.v[0]));
      load<Shape::kKeys, Shape::kPieces>(shared.v[v.slot], p.v, block.batch, block.head,
                                         block.number() * Shape::kKeys, shared.v_full[v.slot]);
    }
  };

  for (unsigned index = blockIdx.x; index < p.row_tiles * p.all_heads;) {
    unsigned next_index = 0;
    if (leader) next_index = gridDim.x + atomicAdd(&p.counter->next, 1u);
    QueryTile tile = query_tile<Shape>(p, index);
    const int kv_head = tile.head / p.group;
    const KeyRange any = note_sight(p, tile, shared);

    // Goes down the blocks of keys: `set` holds what is left of the 32 from block `group` on.
    const int lowest = any.first / Shape::kKeys;
    int group = any.last > 0 ? (any.last - 1) / Shape::kKeys / 32 * 32 : 0;
    BlockSet set = examine_blocks<Shape>(p, tile, shared, group);
    const auto find_block = [&] {
      while (!set.present && group > lowest) {
        group -= 32;
        set = examine_blocks<Shape>(p, tile, shared, group);
      }
      return set.present != 0;
    };

    tile.sees_keys = find_block();
    load_values_until(blocks);  // the last ones of the tile before
    const QueryPlace q(tiles++);
    wait(shared.q_empty[q.slot], q.parity ^ 1);
    if (leader) {
      shared.tile[q.slot] = tile;
      if (tile.sees_keys) {
        arrive_and_expect(shared.q_full[q.slot], sizeof(shared.q[0]));
        load<Shape::kRows, Shape::kPieces>(shared.q[q.slot], p.q, tile.batch, tile.head, tile.row,
                                           shared.q_full[q.slot]);
      } else {
        arrive(shared.q_full[q.slot]);
      }
    }

    for (bool more = tile.sees_keys; more;) {
      const int i = 31 - __clz(set.present);
      const unsigned number = group + i;
      KeyBlock block = {__shfl_sync(~0u, set.notes, i) | number << KeyBlock::kNumberShift,
                        tile.batch, kv_head};
      set.present ^= 1u << i;
      more = find_block();
      if (!more) block.notes |= KeyBlock::kLast;
      const KeyPlace k(blocks);
      wait(shared.k_empty[k.slot], k.parity ^ 1);
      if (leader) {
        shared.block[k.slot] = block;
        arrive_and_expect(shared.k_full[k.slot], sizeof(shared.k[0]));
        load<Shape::kKeys, Shape::kPieces>(shared.k[k.slot], p.k, tile.batch, kv_head,
                                           block.number() * Shape::kKeys, shared.k_full[k.slot]);
      }
      load_values_until(blocks++);
    }
    index = __shfl_sync(~0u, next_index, 0);
  }
  load_values_until(blocks);

  const QueryPlace q(tiles);
  wait(shared.q_empty[q.slot], q.parity ^ 1);
  if (leader) {
    shared.tile[q.slot].batch = -1;
    arrive(shared.q_full[q.slot]);
    if (atomicInc(&p.counter->finished, gridDim.x - 1) == gridDim.x - 1) p.counter->next = 0;
  }
}

}  // namespace torchtune_fused
