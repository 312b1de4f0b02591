// What the host, the producer and the consumers of flash_forward_sm90.cuh hand to each other.
#pragma once

#include "attention/flash_attention.h"
#include "common/tma.cuh"

namespace torchtune_fused {

// The blocks of a launch draw their tiles from it, and leave it at zero.
struct TileCounter {
  unsigned next, finished;
};

struct ForwardKernelParams {
  CUtensorMap q, k, v, out;
  float* lse;
  AttentionMask mask;
  const int64_t* length;
  float score_scale;  // log2(e) times the score is score_scale times what the softmax is taken of:
  float tanh_scale;   // q k, or tanh(tanh_scale q k) if not 0
  int group, queries, keys;
  unsigned heads, all_heads, row_tiles;  // heads of the whole batch; row tiles of a head
  // Heads whose keys and values L2 holds at the same time, and their tiles.
  unsigned section_heads, section_tiles;
  TileCounter* counter;
};

// The tiles for head dimensions up to kHeadDim, as large as registers and shared memory allow.
template <int kHeadDim_>
struct ForwardShape {
  static constexpr int kHeadDim = kHeadDim_;  // a tensor's columns beyond its own read as zeros
  static constexpr int kPieces = (kHeadDim + 63) / 64;             // of 64 columns
  static constexpr int kConsumers = kHeadDim <= 96 ? 3 : 2;        // warpgroups of 64 queries
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = kHeadDim == 96 ? 96 : kHeadDim == 256 ? 64 : 128;
  static constexpr int kQuerySlots = kHeadDim == 256 ? 1 : 2;
  static constexpr int kSlots = kHeadDim == 64 ? 4 : 2;
  static constexpr int kOutSlots = kHeadDim == 128 ? 2 : 1;  // of a warp, each for a piece
  static constexpr bool kTurns = kHeadDim != 64;
  static constexpr int kRowBytes = 128 * kPieces;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Of a thread: what the producer keeps of its share goes to the consumers. The sum must not be
  // above what the launch gives, 65536 / kThreads a thread, down to a multiple of 8.
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
};

struct KeyRange {
  int first, last;  // [first, last)
};

// The keys that any query of a consumer may see, and those that every one may, the bits aside.
struct Sight {
  KeyRange any, every;
};

struct QueryTile {
  int batch;  // negative: there are no more tiles
  int head, row;
  bool sees_keys;
};

// Each consumer sees a block of keys in whole, in part or not at all.
struct KeyBlock {
  // Bit 0: it is the tile's last; 1 + c: consumer c, of 3 at most, sees it; 4 + c: not in whole;
  // from bit 8 on: its number.
  unsigned notes;
  int batch, head;

  static constexpr unsigned kLast = 1;
  static constexpr unsigned kSeen = 2;
  static constexpr unsigned kGeneral = 16;
  static constexpr unsigned kSeenByAny = 7 * kSeen;
  static constexpr int kNumberShift = 8;

  __device__ __forceinline__ int number() const { return notes >> kNumberShift; }
  __device__ __forceinline__ bool last() const { return notes & kLast; }
  __device__ __forceinline__ bool seen(int consumer) const { return notes & kSeen << consumer; }
  // Whether the consumer needs the softcap or masks.
  __device__ __forceinline__ bool general(int consumer) const {
    return notes & kGeneral << consumer;
  }
};

template <typename Shape>
struct ForwardShared {
  unsigned char out[4 * Shape::kConsumers][Shape::kOutSlots][16 * 128];  // of each warp
  unsigned char q[Shape::kQuerySlots][Shape::kRows * Shape::kRowBytes];
  unsigned char k[Shape::kSlots][Shape::kKeys * Shape::kRowBytes];
  unsigned char v[Shape::kSlots][Shape::kKeys * Shape::kRowBytes];
  Barrier q_full[Shape::kQuerySlots], q_empty[Shape::kQuerySlots];
  Barrier k_full[Shape::kSlots], k_empty[Shape::kSlots];
  Barrier v_full[Shape::kSlots], v_empty[Shape::kSlots];
  QueryTile tile[Shape::kQuerySlots + 1];  // comes with q; the last is never written
  KeyBlock block[Shape::kSlots + 1];       // comes with k; the last is never written
  Sight sight[Shape::kConsumers];          // of the tile that is being loaded
  KeyRange seen[Shape::kRows];             // by each query, the bits aside
};

// Where the n-th item of a ring of kSlots goes, and the parity of its barriers then.
template <int kSlots>
struct Place {
  int slot;
  uint32_t parity;

  __device__ __forceinline__ explicit Place(unsigned n)
      : slot(n % kSlots), parity(n / kSlots % 2) {}
};

__device__ __forceinline__ int filled_keys(const ForwardKernelParams& p) {
  return p.length ? static_cast<int>(min(max(*p.length, int64_t{0}), int64_t{p.keys})) : p.keys;
}

// The keys that a query may see, the bits aside. Neither end decreases from one row to the next.
__device__ __forceinline__ KeyRange visible_keys(const ForwardKernelParams& p, int filled,
                                                 int batch, int row) {
  const AttentionMask& mask = p.mask;
  const int key = row + filled - p.queries;
  KeyRange range = {0, filled};
  if (mask.causal) range.last = min(range.last, key + 1);
  if (mask.window) range.first = max(range.first, key - mask.window + 1);
  if (mask.document_start) {
    const int64_t i = int64_t{batch} * p.keys + row;
    range.first = max(range.first, mask.document_start[i]);
    range.last = min(range.last, mask.document_end[i]);
  }
  return range;
}

}  // namespace torchtune_fused
