// Tiles of queries, keys and values in shared memory, as the mma attention kernels use them.
//
// A row of a tile is kColumns 16-bit elements in pieces of 16 bytes. The pieces of a row are
// permuted (exclusive or with bits of the row's number) so that the same piece of eight consecutive
// rows, which is what ldmatrix reads at a time, lies in 32 different banks.
#pragma once

#include "attention/flash_attention.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace torchtune_fused {

// Registers are what these kernels are short of. Without the following the compiler would keep all
// that it can derive from a value that a loop doesn't change, each in a register of its own.
template <typename T>
__device__ __forceinline__ void forget(T& value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}
template <typename... T>
__device__ __forceinline__ void forget(T&... values) {
  (forget(values), ...);
}
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(index));
  return index;
}
__device__ __forceinline__ int3 block_index() {
  int3 index;
  asm volatile("mov.u32 %0, %ctaid.x;" : "=r"(index.x));
  asm volatile("mov.u32 %0, %ctaid.y;" : "=r"(index.y));
  asm volatile("mov.u32 %0, %ctaid.z;" : "=r"(index.z));
  return index;
}

template <int kColumns>
struct Tile {
  static constexpr int kPieces = kColumns / 8;
  static constexpr int kRowBytes = 2 * kColumns;
  static constexpr int kPermuted = kPieces % 8 == 0 ? 8 : kPieces % 4 == 0 ? 4 : 2;  // at a time
  static_assert(kPieces % 2 == 0, "ldmatrix reads two pieces of a row");

  __device__ __forceinline__ static uint32_t offset(int row, int piece) {
    return row * kRowBytes + (piece ^ (row / (8 / kPermuted) & (kPermuted - 1))) * 16;
  }
};

// Where a lane reads its rows of 8 x 8 matrices: `row` and `piece` say which of those at the tile's
// corner; the others follow at multiples of 8 rows and of two pieces. A tile starts at a multiple
// of 128 bytes, so that the permutation is one exclusive or with the whole address.
template <int kColumns>
struct MatrixReader {
  uint32_t corner;

  __device__ __forceinline__ MatrixReader(int row, int piece)
      : corner(Tile<kColumns>::offset(row, piece)) {}
  __device__ __forceinline__ uint32_t operator()(uint32_t tile, int rows, int pair) const {
    constexpr int kPairs = Tile<kColumns>::kPermuted / 2;
    return ((tile + corner) ^ ((pair & (kPairs - 1)) * 32)) + pair / kPairs * (kPairs * 32) +
           rows * Tile<kColumns>::kRowBytes;
  }
  __device__ __forceinline__ void forget() { torchtune_fused::forget(corner); }
};

// For 16 x 16 blocks: as A [m, k], or as two B side by side from [k, n], transposed.
template <int kColumns>
__device__ __forceinline__ MatrixReader<kColumns> row_reader(int lane) {
  return {lane % 16, lane / 16};
}
// As two B side by side from [n, k], or as A from [k, m], transposed.
template <int kColumns>
__device__ __forceinline__ MatrixReader<kColumns> column_reader(int lane) {
  return {lane % 8 + lane / 16 * 8, lane / 8 % 2};
}

// Starts the copy of kRows rows; those from `rows` on, and columns from head_dim on, become zeros.
template <int kRows, int kColumns, int kThreads, typename T>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* source, int64_t row_stride,
                                          int rows, int head_dim) {
  constexpr int kPieces = kColumns / 8;
  constexpr int kWidth = kPieces % 8 == 0 ? kPieces : 4;  // pieces of a row at a time
  constexpr int kStep = kThreads / kWidth;                // rows at a time
  static_assert(kPieces % kWidth == 0 && kThreads % kWidth == 0);
  const int thread = thread_index(), first_row = thread / kWidth, first_piece = thread % kWidth;
  const T* from = source + first_row * row_stride + first_piece * 8;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const int row = first_row + i;
    if (kRows % kStep != 0 && row >= kRows) break;
#pragma unroll
    for (int j = 0; j < kPieces; j += kWidth) {
      const int piece = first_piece + j;
      copy_async_16(tile + Tile<kColumns>::offset(row, piece), from + j * 8,
                    row < rows && piece * 8 < head_dim);
    }
    from += kStep * row_stride;
  }
}

// Writes kRows rows of a tile, from `row` on, which a warp does by itself; none from `rows` on.
template <int kRows, int kColumns, typename T>
__device__ __forceinline__ void store_rows(T* target, int64_t row_stride, uint32_t tile, int row,
                                           int rows, int head_dim) {
  constexpr int kPieces = kColumns / 8;
  constexpr int kWidth = kPieces % 8 == 0 ? kPieces : 4;  // pieces of a row at a time
  constexpr int kStep = 32 / kWidth;                      // rows at a time
  const int lane = thread_index() % 32, first_piece = lane % kWidth;
  row += lane / kWidth;
  T* to = target + row * row_stride + first_piece * 8;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
#pragma unroll
    for (int j = 0; j < kPieces; j += kWidth) {
      const int piece = first_piece + j;
      if (row + i < rows && piece * 8 < head_dim) {
        *reinterpret_cast<uint4*>(to + j * 8) =
            load_shared_16(tile + Tile<kColumns>::offset(row + i, piece));
      }
    }
    to += kStep * row_stride;
  }
}

__device__ __forceinline__ void store_shared_4(uint32_t shared, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(v) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To about 1e-6; tanh.approx is only good for 5e-4, too coarse for a cap of 50.
__device__ __forceinline__ float tanh_fast(float x) {
  return 1.f - __fdividef(2.f, exp2_fast(x * 2.8853900817779268f) + 1.f);
}

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// How raw products of queries and keys become scores, in units of log2(e) so that exp2 serves. Made
// on the host: kernel arguments cost no registers.
struct ScoreScale {
  float factor;        // what is left to multiply by, after bend() where it is called for
  bool bent;           // whether the scores need more than a positive factor
  float inner, outer;  // of bend()

  explicit ScoreScale(const FlashAttentionParams& p)
      : factor(static_cast<float>(p.scale) * kLog2E),
        bent(p.softcap != 0.0 || p.scale <= 0.0),
        inner(factor),
        outer(static_cast<float>(p.softcap) * kLog2E) {
    if (p.softcap != 0.0) inner = static_cast<float>(p.scale / p.softcap);
    if (bent) factor = 1.f;
  }
  __device__ __forceinline__ float bend(float product) const {
    return outer == 0.f ? product * inner : outer * tanh_fast(product * inner);
  }
  // The softcap's derivative, 1 - tanh^2, where the score has given a probability.
  __device__ __forceinline__ float slope(float probability, float lse) const {
    const float t = probability > 0.f ? __fdividef(__log2f(probability) + lse, outer) : 0.f;
    return 1.f - t * t;
  }
};

}  // namespace torchtune_fused
