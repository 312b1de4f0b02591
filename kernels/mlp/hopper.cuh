// What the products of the gated MLP need of Hopper beyond common/tma.cuh and common/wgmma.cuh:
// tiles of matrices, and barriers of clusters and warpgroups.
#pragma once

#include <cstdint>

#include "common/cluster.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

namespace torchtune_fused {

// ---- Tiles of matrices, 64 columns wide -----------------------------------------------------------
// In shared memory rows of 128 bytes, swizzled as in tma.cuh. By one thread.

// The bytes count towards the barrier; elements outside of the matrix arrive as zeros.
__device__ __forceinline__ void load_tile(uint32_t shared, const CUtensorMap* map, Barrier& barrier,
                                          int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared),
      "l"(map), "r"(shared_address(&barrier)), "r"(column), "r"(row)
      : "memory");
}

// The same; `policy` says how long L2 keeps the tile.
__device__ __forceinline__ void load_tile(uint32_t shared, const CUtensorMap* map, Barrier& barrier,
                                          int column, int row, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "l"(policy)
      : "memory");
}

// To the same place in every block of `blocks`, a bit mask, where the barrier at the place of this
// one counts the bytes.
__device__ __forceinline__ void load_tile_multicast(uint32_t shared, const CUtensorMap* map,
                                                    Barrier& barrier, int column, int row,
                                                    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

// To global memory; what lies outside of the matrix is left out.
__device__ __forceinline__ void store_tile(const CUtensorMap* map, uint32_t shared, int column,
                                           int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   map),
               "r"(shared), "r"(column), "r"(row)
               : "memory");
}

__device__ __forceinline__ void store_tiles_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// ---- Blocks of a cluster, and warpgroups ----------------------------------------------------------

// Arrives at the barrier that lies at the same place in block `rank` of the cluster.
__device__ __forceinline__ void arrive_at(Barrier& barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

template <int kThreads>
__device__ __forceinline__ void named_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Waits as wgmma_wait does, but leaves the sums of what is still under way alone.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_for_operands() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

}  // namespace torchtune_fused
