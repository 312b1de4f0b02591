// Hopper's matrix instructions: d[64, N] += a[64, 16] b[16, N] by a warpgroup (128 threads), with
// fp32 sums.
//
// They run on their own: between `wgmma_begin` and the `wgmma_wait` that covers them the registers
// of their operands must be left alone. In warp w and lane l, with g = 16 w + l / 4 and q = l % 4,
// d[4 j + e] is column 8 j + 2 q + e % 2 of row g + 8 (e / 2); a is held as by mma.m16n8k16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/ptx.cuh"

namespace torchtune_fused {

// ---- Operands in shared memory ------------------------------------------------------------------
// Both kinds lie as tma.cuh's tiles do: [pieces][rows][64], rows of 128 bytes, swizzled. All
// distances are in bytes, and kept divided by 16.

__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address, int leading, int stride) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t{1} << 62;
}

// Rows are rows of a or columns of b; the 64 run along k. The next 16 of k are 32 bytes on.
__device__ __forceinline__ uint64_t row_operand(uint32_t address) {
  return swizzled_operand(address, 16, 1024);  // 8 rows are 1024 bytes; the leading one is unused
}

// Rows run along k, the 64 are columns of b or rows of a, and pieces are `piece_bytes` apart. The
// next 16 of k are 2048 bytes on.
__device__ __forceinline__ uint64_t column_operand(uint32_t address, int piece_bytes) {
  return swizzled_operand(address, piece_bytes, 1024);
}

// ---- Order --------------------------------------------------------------------------------------

// Before the first instruction after registers of its operands were written.
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Keeps the compiler from moving reads or writes of registers across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Waits until at most kPending committed groups are still under way; d is then there.
template <int kPending, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&d)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin(d);
}

// ---- Instructions -------------------------------------------------------------------------------

// Has `rows(d, a, b, add)`, where a and b are row operands and d is overwritten without `add`;
// `rows_by_columns(d, a, b, add)`, the same where b is a column operand; `columns_by_columns`,
// where both are; and `columns(d, a, b)`, where a comes in registers and b is a column operand.
template <typename T, int N>
struct Wgmma;

#define TTF_D8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define TTF_D32(i) TTF_D8(i), TTF_D8(i + 8), TTF_D8(i + 16), TTF_D8(i + 24)
#define TTF_R0_31                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TTF_R32_63                                                                              \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// Registers, their operands, and the numbers of the five operands that follow them.
#define TTF_WGMMA(T, TYPE, N, REGISTERS, OPERANDS, X0, X1, X2, X3, X4)                         \
  template <>                                                                                  \
  struct Wgmma<T, N> {                                                                         \
    static __device__ __forceinline__ void rows(float (&d)[N / 2], uint64_t a, uint64_t b,     \
                                                bool add) {                                    \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" X2                                       \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"   \
                   REGISTERS "}, %" X0 ", %" X1 ", p, 1, 1, 0, 0; }"                           \
                   : OPERANDS                                                                  \
                   : "l"(a), "l"(b), "r"(int(add)));                                           \
    }                                                                                          \
    static __device__ __forceinline__ void rows_by_columns(float (&d)[N / 2], uint64_t a,      \
                                                           uint64_t b, bool add) {             \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" X2                                       \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"   \
                   REGISTERS "}, %" X0 ", %" X1 ", p, 1, 1, 0, 1; }"                           \
                   : OPERANDS                                                                  \
                   : "l"(a), "l"(b), "r"(int(add)));                                           \
    }                                                                                          \
    static __device__ __forceinline__ void columns_by_columns(float (&d)[N / 2], uint64_t a,   \
                                                              uint64_t b, bool add) {          \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" X2                                       \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"   \
                   REGISTERS "}, %" X0 ", %" X1 ", p, 1, 1, 1, 1; }"                           \
                   : OPERANDS                                                                  \
                   : "l"(a), "l"(b), "r"(int(add)));                                           \
    }                                                                                          \
    static __device__ __forceinline__ void columns(float (&d)[N / 2], const uint32_t (&a)[4],  \
                                                   uint64_t b) {                               \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {"        \
                   REGISTERS "}, {%" X0 ", %" X1 ", %" X2 ", %" X3 "}, %" X4 ", 1, 1, 1, 1;"   \
                   : OPERANDS                                                                  \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                      \
    }                                                                                          \
  };
#define TTF_COMMA ,
#define TTF_D16(i) TTF_D8(i), TTF_D8(i + 8)
#define TTF_R32_47 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TTF_R64_79 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define TTF_R64_95                                                                                \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "    \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TTF_R64_127                                                                               \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "    \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "    \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "    \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TTF_WGMMA_64(T, TYPE) \
  TTF_WGMMA(T, TYPE, 64, TTF_R0_31, TTF_D32(0), "32", "33", "34", "35", "36")
#define TTF_WGMMA_128(T, TYPE)                                                        \
  TTF_WGMMA(T, TYPE, 128, TTF_R0_31 ", " TTF_R32_63, TTF_D32(0) TTF_COMMA TTF_D32(32), \
            "64", "65", "66", "67", "68")
#define TTF_WGMMA_96(T, TYPE)                                                       \
  TTF_WGMMA(T, TYPE, 96, TTF_R0_31 ", " TTF_R32_47, TTF_D32(0) TTF_COMMA TTF_D16(32), \
            "48", "49", "50", "51", "52")
#define TTF_WGMMA_160(T, TYPE)                                                                  \
  TTF_WGMMA(T, TYPE, 160, TTF_R0_31 ", " TTF_R32_63 ", " TTF_R64_79,                            \
            TTF_D32(0) TTF_COMMA TTF_D32(32) TTF_COMMA TTF_D16(64), "80", "81", "82", "83", "84")
#define TTF_WGMMA_192(T, TYPE)                                                                  \
  TTF_WGMMA(T, TYPE, 192, TTF_R0_31 ", " TTF_R32_63 ", " TTF_R64_95,                            \
            TTF_D32(0) TTF_COMMA TTF_D32(32) TTF_COMMA TTF_D32(64), "96", "97", "98", "99", "100")
#define TTF_WGMMA_256(T, TYPE)                                                                    \
  TTF_WGMMA(T, TYPE, 256, TTF_R0_31 ", " TTF_R32_63 ", " TTF_R64_127,                             \
            TTF_D32(0) TTF_COMMA TTF_D32(32) TTF_COMMA TTF_D32(64) TTF_COMMA TTF_D32(96), "128",  \
            "129", "130", "131", "132")

TTF_WGMMA_64(__half, "f16")
TTF_WGMMA_64(__nv_bfloat16, "bf16")
TTF_WGMMA_128(__half, "f16")
TTF_WGMMA_128(__nv_bfloat16, "bf16")
TTF_WGMMA_96(__half, "f16")
TTF_WGMMA_96(__nv_bfloat16, "bf16")
TTF_WGMMA_160(__half, "f16")
TTF_WGMMA_160(__nv_bfloat16, "bf16")
TTF_WGMMA_192(__half, "f16")
TTF_WGMMA_192(__nv_bfloat16, "bf16")
TTF_WGMMA_256(__half, "f16")
TTF_WGMMA_256(__nv_bfloat16, "bf16")

#undef TTF_WGMMA_256
#undef TTF_WGMMA_192
#undef TTF_WGMMA_160
#undef TTF_WGMMA_96
#undef TTF_WGMMA_128
#undef TTF_WGMMA_64
#undef TTF_R64_127
#undef TTF_R64_95
#undef TTF_R64_79
#undef TTF_R32_47
#undef TTF_D16
#undef TTF_COMMA
#undef TTF_WGMMA
#undef TTF_R32_63
#undef TTF_R0_31
#undef TTF_D32
#undef TTF_D8

}  // namespace torchtune_fused
