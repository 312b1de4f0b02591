// How the blocks of a cluster hand each other the results of their splits, without a way through
// global memory: each merges a share of the columns, and the others store into its shared memory,
// whose barrier counts the bytes. 9.0 only.
#pragma once

#include "attention/attention.h"
#include "common/cluster.cuh"
#include "common/tma.cuh"

namespace torchtune_fused {

// Where a block of a cluster finds the results of all its active blocks for the pieces (four
// columns of a row) that it merges: those of index split * share to (split + 1) * share.
struct Inbox {
  int pieces, share;  // of the row tile, and of one block
  Barrier* full;
  float4* outs;   // [split][share]
  float2* stats;  // [split][share]: maximum, sum

  static constexpr int kPieceBytes = sizeof(float4) + sizeof(float2);
  __host__ __device__ static int bytes(int pieces, int splits) {
    return (16 + (pieces + splits) * kPieceBytes + 127) / 128 * 128;
  }

  __device__ Inbox(unsigned char* shared, const DecodeAttentionParams& p, int rows, int active)
      : pieces(rows * p.head_dim / 4),
        share((pieces + active - 1) / active),
        full(reinterpret_cast<Barrier*>(shared)),
        outs(reinterpret_cast<float4*>(shared + 16)),
        stats(reinterpret_cast<float2*>(outs + active * share)) {}

  __device__ int begin(int split) const { return min(split * share, pieces); }

  __device__ void open(int split, int active) const {
    init(*full, 1);
    fence_init();
    arrive_and_expect(*full, (begin(split + 1) - begin(split)) * active * kPieceBytes);
  }

  __device__ void send(int split, int piece, float4 out, float2 stat) const {
    const int owner = piece / share, at = split * share + piece % share;
    const uint32_t barrier = in_block(shared_address(full), owner);
    store_async(in_block(shared_address(outs + at), owner), out, barrier);
    store_async(in_block(shared_address(stats + at), owner), stat, barrier);
  }
};

}  // namespace torchtune_fused
