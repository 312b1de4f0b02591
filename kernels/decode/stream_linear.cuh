// Weight-streaming linear for 1 to 16 tokens: the floor is the bytes of the weights.
//
// Grid: one block per SM, each with an equal share of the pairs of weight rows. Block: 8 warps.
// What a pair is, the Job says: rows 2i and 2i + 1, gate and up, or the two rows that RoPE rotates
// together. Both sums of a pair meet in one thread.
// Tile: up to 8 pairs, all of k.
// The 8 warps split k: warp w takes the chunks of 64 with index w mod 8. Each warp streams its
// chunks (16 rows x 128 bytes) through a ring of its own in shared memory, kStages deep, with no
// barrier but its own. The ring runs on across tiles, so memory never waits for an epilogue, and
// its first filling comes before the wait for the grid ahead.
//
// Tensor cores: weights are A (16 rows: the a rows of the 8 pairs, then the b rows), tokens are B
// (8 columns, once or twice). Any order of k serves, if A and B agree: a lane takes 16 contiguous
// bytes (8 k) of its row, and uses them as the fragments of two mma steps.
// Shared memory: rows are 128 bytes; the two halves of odd rows are swapped, so that two rows read
// side by side never meet in a bank.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "decode/decode.h"

namespace torchtune_fused {

constexpr int kWarps = 8;
constexpr int kLinearThreads = 32 * kWarps;
constexpr int kPairs = 8;               // pairs of rows in a tile
constexpr int kChunk = 64;              // k in one chunk
constexpr int kChunkBytes = 2 * kChunk; // of one row
constexpr int kStageBytes = 2 * kPairs * kChunkBytes;
// Stages of a warp's ring. On 9.0 exactly two blocks fit into an SM: one of the kernel that runs
// and one of the next, which so spreads evenly over the SMs; on 8.6 one block must do with 99 KB.
constexpr int kStagesSm90 = 5, kStagesSm80 = 4;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kStages = kStagesSm80;
#else
constexpr int kStages = kStagesSm90;
#endif
constexpr int kPace = 2;  // stages under way while a block waits for the grid ahead
constexpr int kRingBytes = kWarps * kStages * kStageBytes;
constexpr int kReduceBytes = 2 * kWarps * kPairs * 8;  // per token: two buffers of all warps' sums
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

__device__ __forceinline__ float norm_scale(const TokensParams& p, const float* squares, int token) {
  float sum = 0.f;
  for (int i = 0; i < 1 << warps_per_token_log2(p.tokens); ++i) sum += squares[token * kWarps + i];
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
      const float scale = norm_scale(p, squares, token);
      for (int piece = first_piece; piece < pieces; piece += piece_step) {
        const uint4 v = load_shared_16(address(token, piece));
        const uint4 weight = load_shared_16(norm_shared + piece * 16);
        store_shared_16(address(token, piece), scale_by<T>(v, scale, weight));
      }
    }
    __syncthreads();
  }
}

// A Job has:
//   bool kLetsCacheBeRead;                      see "Reading a cache ahead" in common/launch.h
//   int pairs() const;
//   const T* row(int pair, int side) const;     null where there is no such row
//   Operands load(int pair, int token) const;   what the epilogue needs, fetched ahead
//   void store(int pair, int token, float a, float b, const Operands&) const;
template <typename T, typename Job, int kTokenTiles, bool kResident>
__global__ void __launch_bounds__(kLinearThreads)
    stream_linear_kernel(const __grid_constant__ TokensParams p, const __grid_constant__ Job job) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float squares[kMaxTokens * kWarps];  // of each token, by warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t ring = shared_address(shared) + warp * kStages * kStageBytes;
  float2* reduce = reinterpret_cast<float2*>(shared + kRingBytes);  // [buffer][warp][token][pair]
  const uint32_t x_shared = shared_address(shared) + kRingBytes + kReduceBytes * p.tokens;
  const uint32_t norm_shared = x_shared + p.tokens * padded_k(p.k) * 2;

  const int share = job.pairs() / gridDim.x, left_over = job.pairs() % gridDim.x;
  const int first_pair = blockIdx.x * share + min(static_cast<int>(blockIdx.x), left_over);
  const int end_pair = first_pair + share + (blockIdx.x < left_over);
  const int chunks = padded_k(p.k) / kChunk;
  if (!Job::kLetsCacheBeRead) launch_dependents();

  // The producer: a lane brings pieces `lane % 8` of rows lane / 8 + {0, 4, 8, 12}.
  int load_pair = warp < chunks ? first_pair : end_pair;  // k may be short
  int load_chunk = warp;
  const T* rows[4];
  const uint64_t evict_first = evict_first_policy();
  const auto load_stage = [&](int stage) {
    if (load_pair < end_pair) {
      if (load_chunk == warp) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 8 + 4 * i;
          const int pair = load_pair + row % kPairs;
          rows[i] = pair < end_pair ? job.row(pair, row / kPairs) : nullptr;
        }
      }
      const int k = load_chunk * kChunk + lane % 8 * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 8 + 4 * i;
        const bool valid = rows[i] != nullptr && k < p.k;
        copy_async_16_once(ring + stage * kStageBytes + row * kChunkBytes + swizzle(row, lane % 8),
                           valid ? rows[i] + k : static_cast<const T*>(p.x), valid, evict_first);
      }
      load_chunk += kWarps;
      if (load_chunk >= chunks) {
        load_chunk = warp;
        load_pair += kPairs;
      }
    }
    copy_async_commit();  // an empty group too, so that waiting counts stay the same
  };

  // Before the grid ahead ends: the norm's weights and the first stages.
  if (kResident && p.norm_weight != nullptr) {
    for (int piece = threadIdx.x; piece < padded_k(p.k) / 8; piece += kLinearThreads) {
      const bool valid = piece * 8 < p.k;
      copy_async_16(norm_shared + piece * 16,
                    static_cast<const T*>(p.norm_weight) + (valid ? piece * 8 : 0), valid);
    }
  }
#pragma unroll 1  // compact code: a kernel's instructions come from memory, too, as each one starts
  for (int stage = 0; stage < kStages; ++stage) {
    load_stage(stage);
    // No faster than they arrive: what the running kernel asks for on this SM would wait behind them.
    copy_async_wait<kPace - 1>();
  }
  wait_for_grid();
  if (Job::kLetsCacheBeRead) launch_dependents();
  if constexpr (kResident) {
    copy_async_wait<kStages - 1>();  // the norm's weights came with the first group
    __syncthreads();  // each thread waited for its own pieces of them
    stage_tokens<T>(p, x_shared, norm_shared, squares);
  }

  const int group = lane / 4, quad = lane % 4;  // the row and the column pair of an mma fragment
  const uint32_t fragment = group * kChunkBytes + swizzle(group, quad);
  const int out_token = threadIdx.x / kPairs, out_pair = threadIdx.x % kPairs;
  const bool scales = kResident && kNormsLast<T> && p.norm_weight != nullptr;
  const float scale = scales && out_token < p.tokens ? norm_scale(p, squares, out_token) : 1.f;
  int stage = 0, buffer = 0;
  for (int tile = first_pair; tile < end_pair; tile += kPairs) {
    // Whether this thread stores the sums of a pair.
    const bool stores = out_token < p.tokens && tile + out_pair < end_pair;
    typename Job::Operands operands = {};
    if (stores) operands = job.load(tile + out_pair, out_token);
    float sums[2][kTokenTiles][4] = {};  // of the two halves of chunks: two chains of mma
    for (int chunk = warp; chunk < chunks; chunk += kWarps) {
      uint4 x[kTokenTiles][2];
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const int token = 8 * t + group;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[t][half] = {0, 0, 0, 0};
          if constexpr (kResident) {
            if (token < p.tokens) {
              x[t][half] = load_shared_16(x_shared + token * padded_k(p.k) * 2 +
                                          chunk * kChunkBytes + (swizzle(group, quad) ^ half * 64));
            }
          } else {
            const int k = chunk * kChunk + half * 32 + quad * 8;
            if (token < p.tokens && k < p.k) {
              x[t][half] = *reinterpret_cast<const uint4*>(
                  static_cast<const T*>(p.x) + static_cast<int64_t>(token) * p.k + k);
            }
          }
        }
      }
      copy_async_wait<kStages - 1>();
      __syncwarp();
      uint4 a[2], b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t address = ring + stage * kStageBytes + (fragment ^ half * 64);
        a[half] = load_shared_16(address);
        b[half] = load_shared_16(address + kPairs * kChunkBytes);
      }
      __syncwarp();  // all lanes have read the stage: it may be filled again
      load_stage(stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          mma_16x8x16<T>(sums[half][t], a[half].x, b[half].x, a[half].y, b[half].y, x[t][half].x,
                         x[t][half].y);
          mma_16x8x16<T>(sums[half][t], a[half].z, b[half].z, a[half].w, b[half].w, x[t][half].z,
                         x[t][half].w);
        }
      }
    }

    // Add up the warps' sums. Two buffers in turn: one barrier per tile is enough, because the
    // barrier of the next tile comes after this tile's reads and before the buffer's next use.
    float2* partials = reduce + buffer * kWarps * p.tokens * kPairs;
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = 8 * t + 2 * quad + j;
        if (token < p.tokens) {
          partials[(warp * p.tokens + token) * kPairs + group] = {
              sums[0][t][j] + sums[1][t][j], sums[0][t][j + 2] + sums[1][t][j + 2]};
        }
      }
    }
    __syncthreads();
    if (stores) {
      float a = 0.f, b = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 sum = partials[(w * p.tokens + out_token) * kPairs + out_pair];
        a += sum.x;
        b += sum.y;
      }
      job.store(tile + out_pair, out_token, a * scale, b * scale, operands);
    }
    buffer ^= 1;
  }
  copy_async_wait<0>();
}

// ---- Host ---------------------------------------------------------------------------------------

inline int shared_bytes(const TokensParams& in, bool resident) {
  const int ring = kWarps * kStageBytes * (runs_sm90_code() ? kStagesSm90 : kStagesSm80);
  const int tokens = resident ? in.tokens * padded_k(in.k) * 2 : 0;
  const int norm = resident && in.norm_weight ? padded_k(in.k) * 2 : 0;
  return ring + kReduceBytes * in.tokens + tokens + norm;
}

// Whether a block keeps the tokens in shared memory. On 9.0 two blocks must fit into an SM.
inline bool tokens_are_resident(const TokensParams& in) {
  constexpr int kStaticBytes = kMaxTokens * kWarps * 4;
  const int limit = runs_sm90_code() ? 113 * 1024 : device_properties().max_shared_per_block;
  return shared_bytes(in, true) <= limit - kStaticBytes;
}

template <typename T, typename Job>
void launch_stream_linear(TokensParams in, const Job& job, cudaStream_t stream) {
  const int pairs = job.pairs();
  const bool resident = tokens_are_resident(in);
  if (!resident && in.norm_weight) {
    launch_normalize_tokens(in, stream);
    in.x = in.scratch;
    in.norm_weight = nullptr;
  }
  const bool one = in.tokens <= 8;
  const auto kernel = resident ? one ? stream_linear_kernel<T, Job, 1, true>
                                     : stream_linear_kernel<T, Job, 2, true>
                      : one    ? stream_linear_kernel<T, Job, 1, false>
                               : stream_linear_kernel<T, Job, 2, false>;
  const int bytes = shared_bytes(in, resident);
  allow_shared_memory(kernel, bytes);
  const int blocks = std::min(pairs, device_properties().num_sms);
  launch_chained(kernel, blocks, kLinearThreads, bytes, stream, in, job);
}

}  // namespace torchtune_fused
