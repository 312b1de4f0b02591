// Which tiles of the score matrix a block of the attention kernels visits, and what it masks there.
//
// Causality, a window, documents and the length all let a query see a range of keys whose two ends
// never decrease from query to query, and a key be seen by such a range of queries. So the ranges
// of a tile's first and last row tell of any tile whether it is empty, full or partial; the bit
// mask brings a table of its own. Only partial tiles look at single elements.
#pragma once

#include "attention/flash_tiles.cuh"

namespace torchtune_fused {

struct Range {
  int begin, end;
};

__device__ __forceinline__ int filled_keys(const FlashAttentionParams& p) {
  if (p.length == nullptr) return p.keys;
  const long long length = *reinterpret_cast<const long long*>(p.length);
  return static_cast<int>(length < 0 ? 0 : length < p.keys ? length : p.keys);
}

// Keys that the mask's ranges let a query see.
__device__ __forceinline__ Range keys_of_query(const FlashAttentionParams& p, int batch, int query,
                                               int length) {
  const AttentionMask& mask = p.mask;
  const int position = query + length - p.queries;
  Range keys = {0, length};
  if (mask.causal) keys.end = min(keys.end, position + 1);
  if (mask.window != 0) keys.begin = max(keys.begin, position - mask.window + 1);
  if (mask.document_start != nullptr) {
    const int64_t at = static_cast<int64_t>(batch) * p.keys + query;
    keys.begin = max(keys.begin, mask.document_start[at]);
    keys.end = min(keys.end, mask.document_end[at]);
  }
  return keys;
}

// Queries that they let see a key.
__device__ __forceinline__ Range queries_of_key(const FlashAttentionParams& p, int batch, int key) {
  const AttentionMask& mask = p.mask;
  const int position = key - (p.keys - p.queries);
  Range queries = {0, p.queries};
  if (mask.causal) queries.begin = max(queries.begin, position);
  if (mask.window != 0) queries.end = min(queries.end, position + mask.window);
  if (mask.document_start != nullptr) {
    const int64_t at = static_cast<int64_t>(batch) * p.keys + key;
    queries.begin = max(queries.begin, mask.document_start[at]);
    queries.end = min(queries.end, mask.document_end[at]);
  }
  return queries;
}

// What the bit mask says of a rectangle, from its table of tiles.
__device__ __forceinline__ MaskTileKind kind_in_table(const AttentionMask& mask, int batch,
                                                      int head, Range queries, Range keys) {
  const unsigned char* table =
      mask.tile_kinds + batch * mask.kinds_batch_stride + head * mask.kinds_head_stride;
  bool empty = true, full = true;
  for (int i = queries.begin / kMaskTile; i * kMaskTile < queries.end; ++i) {
    for (int j = keys.begin / kMaskTile; j * kMaskTile < keys.end; ++j) {
      const int kind = table[static_cast<int64_t>(i) * mask.kinds_row_stride + j];
      empty &= kind == kTileEmpty;
      full &= kind == kTileFull;
    }
  }
  return empty ? kTileEmpty : full ? kTileFull : kTilePartial;
}

// What the ranges say of a tile on the other side, given those of the first and the last row here.
__device__ __forceinline__ MaskTileKind kind_in_ranges(Range tile, Range first, Range last) {
  if (tile.end <= first.begin || tile.begin >= last.end) return kTileEmpty;
  return tile.begin >= last.begin && tile.end <= first.end ? kTileFull : kTilePartial;
}

// Of a tile of keys, for a block of queries; keys may reach beyond the length.
__device__ __forceinline__ MaskTileKind kind_of_keys(const FlashAttentionParams& p, int batch,
                                                     int head, Range queries, Range keys,
                                                     int length) {
  const MaskTileKind kind = kind_in_ranges(keys, keys_of_query(p, batch, queries.begin, length),
                                           keys_of_query(p, batch, queries.end - 1, length));
  if (kind == kTileEmpty || p.mask.tile_kinds == nullptr) return kind;
  keys.end = min(keys.end, length);
  const MaskTileKind bits = kind_in_table(p.mask, batch, head, queries, keys);
  return bits == kTileFull ? kind : bits;
}

// Of a tile of queries, for a block of keys, which may reach beyond the last.
__device__ __forceinline__ MaskTileKind kind_of_queries(const FlashAttentionParams& p, int batch,
                                                        int head, Range queries, Range keys) {
  const bool whole = keys.end <= p.keys;
  keys.end = min(keys.end, p.keys);
  const MaskTileKind kind = kind_in_ranges(queries, queries_of_key(p, batch, keys.begin),
                                           queries_of_key(p, batch, keys.end - 1));
  if (kind == kTileEmpty) return kind;
  const MaskTileKind bits =
      p.mask.tile_kinds == nullptr ? kTileFull : kind_in_table(p.mask, batch, head, queries, keys);
  if (bits == kTileEmpty) return bits;
  return bits == kTileFull && whole ? kind : kTilePartial;
}

// A word with the bits from begin to end - 1 set, as far as it has them.
__device__ __forceinline__ uint32_t bits_between(int begin, int end) {
  const auto below = [](int bit) { return bit <= 0 ? 0u : bit >= 32 ? ~0u : (1u << bit) - 1; };
  return below(end) & ~below(begin);
}

// Sets the scores that the mask hides to -inf: a lane's fragments of 16 queries by kBlockN keys,
// from kFirst on; the queries of fragment i start at first_query + i * stride.
template <int kFirst, int kBlockN, int kTilesM>
__device__ __forceinline__ void mask_scores(float (&s)[kTilesM][kBlockN / 8][4],
                                            const FlashAttentionParams& p, int batch, int head,
                                            int length, int first_query, int stride,
                                            int first_key) {
  const int thread = thread_index(), quad = thread % 4, group_row = thread % 32 / 4;
#pragma unroll
  for (int i = kFirst; i < kTilesM; ++i) {
    const int first_row = min(first_query + i * stride, p.queries - 1);
    const Range rows = {first_row, min(first_row + 16, p.queries)};
    if (kind_of_keys(p, batch, head, rows, {first_key, first_key + kBlockN}, length) == kTileFull) {
      continue;
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int query = min(first_row + j * 8 + group_row, p.queries - 1);
      const Range keys = keys_of_query(p, batch, query, length);
#pragma unroll
      for (int w = 0; w < kBlockN / 32; ++w) {
        const int first = first_key + w * 32;
        uint32_t visible = bits_between(keys.begin - first, keys.end - first);
        if (p.mask.bits != nullptr && first / 32 < p.mask.bits_row_stride) {
          visible &= p.mask.bits[batch * p.mask.bits_batch_stride + head * p.mask.bits_head_stride +
                                 static_cast<int64_t>(query) * p.mask.bits_row_stride + first / 32];
        }
        visible >>= quad * 2;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& score = s[i][w * 4 + e / 2][j * 2 + e % 2];
          score = visible >> (e / 2 * 8 + e % 2) & 1 ? score : -INFINITY;
        }
      }
    }
  }
}

// The same of transposed scores: 16 kTilesN keys by kBlockM queries.
template <int kBlockM, int kTilesN>
__device__ __forceinline__ void mask_scores_transposed(float (&s)[kTilesN][kBlockM / 8][4],
                                                       const FlashAttentionParams& p, int batch,
                                                       int head, int first_query, int first_key) {
  const int thread = thread_index(), quad = thread % 4, group_row = thread % 32 / 4;
#pragma unroll
  for (int r = 0; r < 2 * kTilesN; ++r) {
    const int key = first_key + r * 8 + group_row;
    const Range queries = key < p.keys ? queries_of_key(p, batch, key) : Range{0, 0};
#pragma unroll
    for (int w = 0; w < kBlockM; w += 32) {
      const int first = first_query + w + quad * 2;
      const uint32_t visible = bits_between(queries.begin - first, queries.end - first);
#pragma unroll
      for (int e = 0; e < 8 && w + e * 4 < kBlockM; ++e) {
        float& score = s[r / 2][w / 8 + e / 2][r % 2 * 2 + e % 2];
        score = visible >> (e / 2 * 8 + e % 2) & 1 ? score : -INFINITY;
      }
    }
  }
  if (p.mask.bits == nullptr || first_key >= p.keys) return;
  const uint32_t* words = p.mask.bits + batch * p.mask.bits_batch_stride +
                          head * p.mask.bits_head_stride + first_key / 32;
#pragma unroll
  for (int e = 0; e < kBlockM / 4; ++e) {
    const int query = min(first_query + e / 2 * 8 + e % 2 + quad * 2, p.queries - 1);
    const uint32_t visible =
        words[static_cast<int64_t>(query) * p.mask.bits_row_stride] >> (first_key % 32 + group_row);
#pragma unroll
    for (int r = 0; r < 2 * kTilesN; ++r) {
      float& score = s[r / 2][e / 2][r % 2 * 2 + e % 2];
      score = visible >> (r * 8) & 1 ? score : -INFINITY;
    }
  }
}

// One register, since it lives through the loops that need them all.
struct VisitedTile {
  int code;

  __device__ __forceinline__ bool exists() const { return code >= 0; }
  __device__ __forceinline__ int index() const { return code >> 1; }
  __device__ __forceinline__ bool partial() const { return code & 1; }
};

// Walks over the tiles that are not empty. Each lane of a warp looks at one of 32 tiles, so that
// long runs of empty ones cost little; all warps walk alike.
template <typename KindOf>
class TileWalk {
 public:
  // Of the tiles [begin, end); kind_of(tile) is a MaskTileKind.
  __device__ __forceinline__ TileWalk(int begin, int end, KindOf kind_of)
      : base_(begin - 32), end_(end), kind_of_(kind_of) {}

  __device__ __forceinline__ void restart(int begin) { base_ = begin - 32; }

  // The next tile, or none.
  __device__ __forceinline__ VisitedTile next() {
    while (visible_ == 0) {
      base_ += 32;
      if (base_ >= end_) return {-1};
      const int mine = base_ + static_cast<int>(threadIdx.x % 32);
      const MaskTileKind kind = mine < end_ ? kind_of_(mine) : kTileEmpty;
      visible_ = __ballot_sync(~0u, kind != kTileEmpty);
      partial_ = __ballot_sync(~0u, kind == kTilePartial);
    }
    const int bit = __ffs(visible_) - 1;
    visible_ &= visible_ - 1;
    return {(base_ + bit) * 2 + static_cast<int>(partial_ >> bit & 1)};
  }

 private:
  int base_, end_;
  unsigned visible_ = 0, partial_ = 0;
  KindOf kind_of_;
};

}  // namespace torchtune_fused
