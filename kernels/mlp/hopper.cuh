// What the products of the gated MLP need of Hopper beyond common/tma.cuh and common/wgmma.cuh:
// tiles of matrices, clusters of blocks, and products 256 columns wide.
#pragma once

#include <cstdint>
#include <type_traits>

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

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

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

// ---- Products of a warpgroup, 256 columns wide ----------------------------------------------------

// Waits as wgmma_wait does, but leaves the sums of what is still under way alone.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_for_operands() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d[64, 256] = a[64, 16] b, added to d if `accumulate`; b is [256, 16] along k, or [16, 256] across.
// Thread t holds rows 16 (t / 32) + t % 32 / 4 + {0, 8}: d[4 j + 2 i + c] is column
// 8 j + 2 (t % 4) + c of row i.
// clang-format off
#define TTF_WGMMA_256(NAME, TYPE) \
  template <bool kAcrossK> \
  __device__ __forceinline__ void wgmma_64x256x16_##NAME(float (&d)[128], uint64_t a, uint64_t b, \
                                                            bool accumulate) { \
    asm volatile( \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n" \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" \
        "%0, %1, %2, %3, %4, %5, %6, %7, " \
        "%8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, " \
        "%24, %25, %26, %27, %28, %29, %30, %31, " \
        "%32, %33, %34, %35, %36, %37, %38, %39, " \
        "%40, %41, %42, %43, %44, %45, %46, %47, " \
        "%48, %49, %50, %51, %52, %53, %54, %55, " \
        "%56, %57, %58, %59, %60, %61, %62, %63, " \
        "%64, %65, %66, %67, %68, %69, %70, %71, " \
        "%72, %73, %74, %75, %76, %77, %78, %79, " \
        "%80, %81, %82, %83, %84, %85, %86, %87, " \
        "%88, %89, %90, %91, %92, %93, %94, %95, " \
        "%96, %97, %98, %99, %100, %101, %102, %103, " \
        "%104, %105, %106, %107, %108, %109, %110, %111, " \
        "%112, %113, %114, %115, %116, %117, %118, %119, " \
        "%120, %121, %122, %123, %124, %125, %126, %127}, " \
        "%128, %129, p, 1, 1, 0, %131;\n}" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
          "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
          "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
          "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
          "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
          "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), \
          "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
          "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), \
          "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), \
          "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), \
          "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
          "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), \
          "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), \
          "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), \
          "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
          "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), \
          "+f"(d[126]), "+f"(d[127]) \
        : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kAcrossK))); \
  }

TTF_WGMMA_256(bf16, "bf16")
TTF_WGMMA_256(half, "f16")

#undef TTF_WGMMA_256
// clang-format on

template <typename T, bool kAcrossK>
__device__ __forceinline__ void wgmma_64x256x16(float (&d)[128], uint64_t a, uint64_t b,
                                                bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    wgmma_64x256x16_half<kAcrossK>(d, a, b, accumulate);
  } else {
    wgmma_64x256x16_bf16<kAcrossK>(d, a, b, accumulate);
  }
}

}  // namespace torchtune_fused
