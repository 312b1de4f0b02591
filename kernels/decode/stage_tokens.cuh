// The tokens of a weight-streaming linear: how they lie in shared memory, and their RMSNorm.
#pragma once

#include <type_traits>

#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "decode/attention_parts.cuh"
#include "decode/decode.h"

namespace torchtune_fused {

constexpr int kWarps = 8;
constexpr int kLinearThreads = 32 * kWarps;
constexpr int kChunk = 64;               // k in one chunk
constexpr int kChunkBytes = 2 * kChunk;  // of one row
// A row of tokens in shared memory: whole chunks.
__host__ __device__ constexpr int padded_k(int k) { return (k + kChunk - 1) / kChunk * kChunk; }

// Where 16-byte piece `piece` (0..7) of a chunk of row `row` lies within the row's 128 bytes.
__device__ __forceinline__ uint32_t swizzle(int row, int piece) {
  return static_cast<uint32_t>(piece ^ ((row & 1) << 2)) * 16;
}

// Whether the division by the root of the mean square waits for the epilogue, where it costs
// nothing. In fp16, x * weight alone could overflow.
template <typename T>
constexpr bool kNormsLast = std::is_same_v<T, __nv_bfloat16>;

// log2 of the number of warps that share a token while it is staged.
__device__ __forceinline__ int warps_per_token_log2(int tokens) {
  return tokens == 1 ? 3 : tokens == 2 ? 2 : tokens <= 4 ? 1 : 0;
}

__device__ __forceinline__ float norm_scale(const TokensParams& p, const float* squares, int token,
                                            int parts) {
  float sum = 0.f;
  for (int i = 0; i < parts; ++i) sum += squares[token * kWarps + i];
  return rsqrtf(__fdividef(sum, static_cast<float>(p.k)) + p.eps);
}

// Copies the tokens to shared memory as x_shared[token][padded_k], times the norm's weight if there
// is one, and leaves each warp's part of a token's sum of squares in `squares`.
// Called by all threads, which leave it with the tokens visible to each other.
template <typename T>
__device__ __forceinline__ void stage_tokens(const TokensParams& p, uint32_t x_shared,
                                             uint32_t norm_shared, float* squares) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int shift = warps_per_token_log2(p.tokens);
  const int warp_of_token = warp & ((1 << shift) - 1);
  const int pieces = padded_k(p.k) / 8;
  const int first_piece = warp_of_token * 32 + lane, piece_step = 32 << shift;
  const auto address = [&](int token, int piece) {
    return x_shared + token * padded_k(p.k) * 2 + piece / 8 * kChunkBytes +
           swizzle(token, piece % 8);
  };
  constexpr int kBatch = 4;  // loads under way at once
  for (int token = warp >> shift; token < p.tokens; token += kWarps >> shift) {
    const uint4* x = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) +
                                                    static_cast<int64_t>(token) * p.k);
    float sum = 0.f;
    for (int first = first_piece; first < pieces; first += kBatch * piece_step) {
      uint4 v[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int piece = first + i * piece_step;
        v[i] = piece * 8 < p.k ? __ldcg(x + piece) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int piece = first + i * piece_step;
        if (piece >= pieces) break;
        if (p.norm_weight != nullptr) {
          sum += sum_of_squares<T>(v[i]);
          if (kNormsLast<T>) {
            v[i] = scale_by<T>(v[i], 1.f, load_shared_16(norm_shared + piece * 16));
          }
        }
        store_shared_16(address(token, piece), v[i]);
      }
    }
    if (p.norm_weight != nullptr) {
      sum = warp_sum(sum);
      if (lane == 0) squares[token * kWarps + warp_of_token] = sum;
    }
  }
  __syncthreads();
  if constexpr (!kNormsLast<T>) {
    if (p.norm_weight == nullptr) return;
    for (int token = warp >> shift; token < p.tokens; token += kWarps >> shift) {
      const float scale = norm_scale(p, squares, token, 1 << shift);
      for (int piece = first_piece; piece < pieces; piece += piece_step) {
        const uint4 v = load_shared_16(address(token, piece));
        const uint4 weight = load_shared_16(norm_shared + piece * 16);
        store_shared_16(address(token, piece), scale_by<T>(v, scale, weight));
      }
    }
    __syncthreads();
  }
}

// The same of one token that attention has left in parts.
template <typename T>
__device__ __forceinline__ void stage_parts(const TokensParams& p, int active, uint32_t x_shared) {
  for (int piece = threadIdx.x; piece < padded_k(p.k) / 8; piece += kLinearThreads) {
    uint4 v = {0, 0, 0, 0};
    if (piece * 8 < p.k) {
      const int head = piece * 8 / kAttendHeadDim, column = piece * 8 % kAttendHeadDim;
      v = merge_parts<T>(p.parts, active, head, column);
    }
    store_shared_16(x_shared + piece / 8 * kChunkBytes + swizzle(0, piece % 8), v);
  }
  __syncthreads();
}

}  // namespace torchtune_fused
