// Hopper's copy engine (TMA) and the barriers in shared memory (mbarrier) that it reports to.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"
#include "common/ptx.cuh"
#include "common/tensor_map.h"

namespace torchtune_fused {

// ---- Barriers -----------------------------------------------------------------------------------
// A phase ends when all arrivals have come, and all bytes that were announced. `wait` returns when
// the phase of this parity has ended; a fresh barrier is in phase 0, and the one before, of parity
// 1, counts as ended.

struct Barrier {
  uint64_t state;
};

__device__ __forceinline__ void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}

// After the last `init`, before the barriers are used.
__device__ __forceinline__ void fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}

__device__ __forceinline__ void arrive_and_expect(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// By whole warps: one instruction asks for all lanes, which thus stay together (.uni), and what
// follows may use the registers of warps.
__device__ __forceinline__ void wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; "
      "@!p bra.uni again; }" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// ---- Copies of tiles of a tensor ----------------------------------------------------------------
// A tile of [rows][columns] of a head lies in shared memory as [columns / 64][rows][64], each row
// of 64 (128 bytes) swizzled: its 16-byte piece c is at c ^ (row % 8). Rows beyond the tensor read
// as zeros and are not written.

inline cuuint64_t stride_bytes(int size, int64_t elements) {
  return size == 1 ? cuuint64_t{16} : static_cast<cuuint64_t>(elements * 2);
}

// Describes a tensor [batch][heads][rows][columns], to be copied in tiles of `tile_rows` rows of
// all columns, a multiple of 64.
inline CUtensorMap tile_map(const void* data, const int64_t (&stride)[3], int batch, int heads,
                            int rows, int columns, int tile_rows, DType dtype) {
  const int pieces = columns / 64;
  const cuuint64_t sizes[5] = {64, cuuint64_t(rows < 1 ? 1 : rows), cuuint64_t(pieces),
                               cuuint64_t(heads), cuuint64_t(batch)};
  const cuuint64_t strides[4] = {stride_bytes(rows, stride[2]), 128,
                                 stride_bytes(heads, stride[1]), stride_bytes(batch, stride[0])};
  return swizzled_map<5>(data, sizes, strides,
                         {64, cuuint32_t(tile_rows), cuuint32_t(pieces), 1, 1}, dtype);
}

// The same for any number of columns, to be copied piece by piece: 64 columns of `tile_rows` rows.
// Columns beyond the tensor, too, read as zeros and are not written.
inline CUtensorMap piece_map(const void* data, const int64_t (&stride)[3], int batch, int heads,
                             int rows, int columns, int tile_rows, DType dtype) {
  const cuuint64_t sizes[4] = {cuuint64_t(columns), cuuint64_t(rows < 1 ? 1 : rows),
                               cuuint64_t(heads), cuuint64_t(batch)};
  const cuuint64_t strides[3] = {stride_bytes(rows, stride[2]), stride_bytes(heads, stride[1]),
                                 stride_bytes(batch, stride[0])};
  return swizzled_map<4>(data, sizes, strides, {64, cuuint32_t(tile_rows), 1, 1}, dtype);
}

// Describes contiguous rows of floats, to be copied one by one as they are: of at most 256 columns,
// a multiple of 4. (cp.async.bulk would need no description, but racecheck reports what it brings.)
inline CUtensorMap row_map(const float* data, int64_t rows, int columns) {
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {columns * sizeof(float)};
  return tensor_map<2>(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, data, sizes, strides,
                       {cuuint32_t(columns), 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// By one thread; the bytes count towards the barrier.
__device__ __forceinline__ void load_tile(void* shared, const CUtensorMap& map, int batch, int head,
                                          int row, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %2, %4, %5}], [%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(0), "r"(row), "r"(head), "r"(batch), "r"(shared_address(&barrier))
      : "memory");
}

__device__ __forceinline__ void load_piece(void* shared, const CUtensorMap& map, int batch,
                                           int head, int row, int column, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(&barrier))
      : "memory");
}

// A whole row of what row_map describes.
__device__ __forceinline__ void load_row(void* shared, const CUtensorMap& map, int row,
                                         Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(0), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// By one thread, after `fence_async` in the threads that wrote the piece and a barrier among them.
__device__ __forceinline__ void store_piece(const CUtensorMap& map, int batch, int head, int row,
                                            int column, const void* shared) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::
          "l"(&map),
      "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(shared))
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// The same, of floats that are added to those that lie there: `bytes`, a multiple of 16.
__device__ __forceinline__ void add_floats(float* global, const float* shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until of this thread's stores all but the last kPending have read shared memory.
template <int kPending = 0>
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Makes this thread's writes to shared memory visible to the copy engine and to wgmma.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace torchtune_fused
