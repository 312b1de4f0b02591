// What the host, the producer and the consumers of flash_backward_sm90.cuh hand to each other.
#pragma once

#include "attention/flash_backward.h"
#include "attention/flash_forward_sm90_shared.cuh"
#include "attention/flash_mask.cuh"
#include "attention/flash_schedule.h"

namespace torchtune_fused {

struct BackwardKernelParams {
  CUtensorMap q, k, v, grad_out;
  CUtensorMap stats;  // a row is what a tile of queries needs
  FlashAttentionBackwardParams arguments;
  FlashBackwardWorkspace workspace;
  Schedule schedule;
  float score_scale;  // log2(e) times the score is score_scale times q k
};

// The tiles for a head dimension, as large as registers and shared memory allow.
template <int kHeadDim_>
struct BackwardShape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = 2;  // warpgroups of 64 keys
  static constexpr int kKeys = 64 * kConsumers;
  static constexpr int kQueries = kHeadDim == 64 ? 128 : 64;  // of a tile
  static constexpr int kSlots = 2;
  static constexpr int kRowBytes = 2 * kHeadDim;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Of a thread: what the producer keeps of its share goes to the consumers. The sum must not be
  // above what the launch gives, 65536 / kThreads a thread, down to a multiple of 8.
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;
  static_assert(kBackwardRows % kQueries == 0);
};

// The first row of a tile of queries among those of its batch in the workspace, with bit 0 set if
// some query does not see some key. Negative: there are no more tiles.
using BackwardTile = int;

template <typename Shape>
struct BackwardShared {
  unsigned char k[Shape::kKeys * Shape::kRowBytes];  // comes with the first q
  unsigned char v[Shape::kKeys * Shape::kRowBytes];  // comes with the first grad_out
  unsigned char q[Shape::kSlots][Shape::kQueries * Shape::kRowBytes];
  unsigned char grad_out[Shape::kSlots][Shape::kQueries * Shape::kRowBytes];
  // dS, [keys / 64][queries][64 keys], swizzled: of this tile, and of the one before.
  unsigned char grad_scores[2][Shape::kQueries * Shape::kKeys * 2];
  float grad_q[4 * Shape::kConsumers][16 * 64];  // of each warp, on its way out
  RowStats stats[Shape::kSlots][Shape::kQueries];  // comes with q
  Barrier q_full[Shape::kSlots], q_empty[Shape::kSlots];
  Barrier grad_out_full[Shape::kSlots], grad_out_empty[Shape::kSlots];
  Barrier grad_scores_full[2], grad_scores_empty[2];
  BackwardTile tile[Shape::kSlots + 1];  // comes with q; the last is never written
  Range seen_by[Shape::kKeys];           // queries that see each key, the bits aside
};

}  // namespace torchtune_fused
