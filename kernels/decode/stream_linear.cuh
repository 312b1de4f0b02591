// Weight-streaming linear for 1 to 16 tokens: the floor is the bytes of the weights.
//
// Grid: one block per SM, each with an equal share of the pairs of weight rows. Block: 8 warps.
// What a pair is, the Job says: rows 2i and 2i + 1, gate and up, or the two rows that RoPE rotates
// together. Both sums of a pair meet in one thread.
// Tile: up to 8 pairs, all of k. Tokens that find no room in shared memory are read from L2 again
// and again: two tiles at a time share what is read.
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

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"
#include "decode/stage_tokens.cuh"

namespace torchtune_fused {

constexpr int kPairs = 8;  // pairs of rows in a tile
constexpr int kStageBytes = 2 * kPairs * kChunkBytes;
// Stages of a warp's ring. On 9.0 exactly two blocks fit into an SM: one of the kernel that runs
// and one of the next, which so spreads evenly over the SMs. A deep ring takes more, where the
// kernel that follows leaves room for it; on 8.6 one block must do with 99 KB.
constexpr int kDeepStages = 7;
__host__ __device__ constexpr int stages_of(bool sm90, bool deep) {
  return !sm90 ? 4 : deep ? kDeepStages : 5;
}
constexpr int kPace = 2;  // stages under way while a block waits for the grid ahead
constexpr int kReduceBytes = 2 * kWarps * kPairs * 8;  // per token: two buffers of all warps' sums

// A Job has:
//   bool kLetsCacheBeRead;                      see "Reading a cache ahead" in common/launch.h
//   bool kMergesParts;                          its one token comes from attention, in parts
//   bool kMayBeDeep;                            then next_k() is the k of the linear that follows
//   int pairs() const;
//   const T* row(int pair, int side) const;     null where there is no such row
//   Operands load(int pair, int token) const;   what the epilogue needs, fetched ahead
//   void store(int pair, int token, float a, float b, const Operands&) const;
template <typename T, typename Job, int kTokenTiles, bool kResident, bool kDeep = false>
__global__ void __launch_bounds__(kLinearThreads, 2)
    stream_linear_kernel(const __grid_constant__ TokensParams p, const __grid_constant__ Job job) {
#if __CUDA_ARCH__ >= 900
  constexpr int kStages = stages_of(true, kDeep);
#else
  constexpr int kStages = stages_of(false, kDeep);
#endif
  constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float squares[kMaxTokens * kWarps];  // of each token, by warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t ring = shared_address(shared) + warp * kStages * kStageBytes;
  float2* reduce = reinterpret_cast<float2*>(shared + kRingBytes);  // [buffer][warp][token][pair]
  const uint32_t x_shared = shared_address(shared) + kRingBytes + kReduceBytes * p.tokens;
  const uint32_t norm_shared = x_shared + (kResident ? p.tokens * padded_k(p.k) * 2 : 0);

  const int share = job.pairs() / gridDim.x, left_over = job.pairs() % gridDim.x;
  const int first_pair = blockIdx.x * share + min(static_cast<int>(blockIdx.x), left_over);
  const int end_pair = first_pair + share + (blockIdx.x < left_over);
  const int chunks = padded_k(p.k) / kChunk;
  constexpr int kRowTiles = kResident ? 1 : 2;  // that share what is read of the tokens
  if (!Job::kLetsCacheBeRead) launch_dependents();

  // The producer: a lane brings pieces `lane % 8` of rows lane / 8 + {0, 4, 8, 12}.
  int load_pair = warp < chunks ? first_pair : end_pair;  // k may be short
  int load_chunk = warp, load_tile = 0;
  const T* rows[kRowTiles][4];
  int active = 0;
  if (Job::kMergesParts && p.parts.reads_ahead) active = active_splits(filled_slots(p.parts));
  const uint64_t evict_first = evict_first_policy();
  const auto load_stage = [&](int stage) {
    if (load_pair < end_pair) {
      if (load_chunk == warp) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = lane / 8 + 4 * i;
          const int pair = load_pair + load_tile * kPairs + row % kPairs;
          const T* start = pair < end_pair ? job.row(pair, row / kPairs) : nullptr;
          if (load_tile == 0) rows[0][i] = start;
          if (load_tile == kRowTiles - 1) rows[kRowTiles - 1][i] = start;
        }
      }
      const int k = load_chunk * kChunk + lane % 8 * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 8 + 4 * i;
        const T* start = load_tile == 0 ? rows[0][i] : rows[kRowTiles - 1][i];
        const bool valid = start != nullptr && k < p.k;
        copy_async_16_once(ring + stage * kStageBytes + row * kChunkBytes + swizzle(row, lane % 8),
                           valid ? start + k : static_cast<const T*>(p.x), valid, evict_first);
      }
      ++load_tile;
      if (load_tile == kRowTiles || load_pair + load_tile * kPairs >= end_pair) {
        load_tile = 0;
        load_chunk += kWarps;
        if (load_chunk >= chunks) {
          load_chunk = warp;
          load_pair += kRowTiles * kPairs;
        }
      }
    }
    copy_async_commit();  // an empty group too, so that waiting counts stay the same
  };

  // Before the grid ahead ends: the norm's weights and the first stages.
  if (p.norm_weight != nullptr) {
    for (int piece = threadIdx.x; piece < padded_k(p.k) / 8; piece += kLinearThreads) {
      const bool valid = piece * 8 < p.k;
      copy_async_16(norm_shared + piece * 16,
                    static_cast<const T*>(p.norm_weight) + (valid ? piece * 8 : 0), valid);
    }
  }
#pragma unroll 1  // compact code: a kernel's instructions come from memory, too, as each one starts
  for (int stage = 0; stage < kStages; ++stage) {
    load_stage(stage);
    // No faster than they arrive: what the running kernel asks for on this SM would wait behind
    // them.
    copy_async_wait<kPace - 1>();
  }
  wait_for_grid();
  if (Job::kLetsCacheBeRead) launch_dependents();
  if (kResident || p.norm_weight != nullptr) {
    copy_async_wait<kStages - 1>();  // the norm's weights came with the first group
    __syncthreads();                 // each thread waited for its own pieces of them
  }
  if constexpr (Job::kMergesParts) {
    if (!p.parts.reads_ahead) active = active_splits(filled_slots(p.parts));
    stage_parts<T>(p, active, x_shared);
  } else if constexpr (kResident) {
    stage_tokens<T>(p, x_shared, norm_shared, squares);
  }

  const int group = lane / 4, quad = lane % 4;  // the row and the column pair of an mma fragment
  const uint32_t fragment = group * kChunkBytes + swizzle(group, quad);
  const int out_token = threadIdx.x / kPairs, out_pair = threadIdx.x % kPairs;
  const bool normalizes = kNormsLast<T> && p.norm_weight != nullptr;
  float scale = 1.f;

  // Tokens that are not resident are loaded a chunk ahead of their use.
  uint4 next_x[kTokenTiles][2];
  const auto load_next = [&](int chunk) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = 8 * t + group, k = chunk * kChunk + half * 32 + quad * 8;
        next_x[t][half] = {0, 0, 0, 0};
        if (token < p.tokens && k < p.k) {
          next_x[t][half] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) +
                                                            static_cast<int64_t>(token) * p.k + k);
        }
      }
    }
  };
  if constexpr (!kResident) load_next(warp);
  float token_squares[kTokenTiles] = {};
  int stage = 0, buffer = 0;
  for (int pass = first_pair; pass < end_pair; pass += kRowTiles * kPairs) {
    const bool first_pass = pass == first_pair;
    typename Job::Operands operands = {};  // of the tile whose sums come next
    const auto load_operands = [&](int tile) {
      const int pair = tile + out_pair;
      if (out_token < p.tokens && pair < end_pair) operands = job.load(pair, out_token);
    };
    load_operands(pass);
    // The halves of chunks apart where there would be but one chain of mma.
    constexpr int kChains = kRowTiles * kTokenTiles == 1 ? 2 : 1;
    float sums[kRowTiles][kChains][kTokenTiles][4] = {};
    for (int chunk = warp; chunk < chunks; chunk += kWarps) {
      uint4 x[kTokenTiles][2];
      if constexpr (kResident) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          const int token = 8 * t + group;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            x[t][half] = {0, 0, 0, 0};
            if (token < p.tokens) {
              x[t][half] = load_shared_16(x_shared + token * padded_k(p.k) * 2 +
                                          chunk * kChunkBytes + (swizzle(group, quad) ^ half * 64));
            }
          }
        }
      } else {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          x[t][0] = next_x[t][0];
          x[t][1] = next_x[t][1];
        }
        load_next(chunk + kWarps < chunks ? chunk + kWarps : warp);
        if (normalizes) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4 weight =
                load_shared_16(norm_shared + chunk * kChunkBytes + half * 64 + quad * 16);
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t) {
              if (first_pass) token_squares[t] += sum_of_squares<T>(x[t][half]);
              x[t][half] = multiply<T>(x[t][half], weight);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        if (r > 0 && pass + r * kPairs >= end_pair) break;
        copy_async_wait<kStages - 1>();
        __syncwarp();
        uint4 a[2], b[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t address = ring + stage * kStageBytes + (fragment ^ half * 64);
          a[half] = load_shared_16(address);
          b[half] = load_shared_16(address + kPairs * kChunkBytes);
        }
        const auto multiply_add = [&] {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t) {
              float (&sum)[4] = sums[r][half % kChains][t];
              const uint4 v = x[t][half];
              mma_16x8x16<T>(sum, a[half].x, b[half].x, a[half].y, b[half].y, v.x, v.y);
              mma_16x8x16<T>(sum, a[half].z, b[half].z, a[half].w, b[half].w, v.z, v.w);
            }
          }
        };
        if (kTokenTiles > 1) multiply_add();  // first, which frees registers
        __syncwarp();  // all lanes have read the stage: it may be filled again
        load_stage(stage);
        stage = stage + 1 == kStages ? 0 : stage + 1;
        if (kTokenTiles == 1) multiply_add();
      }
    }

    if (!kResident && normalizes && first_pass) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        float sum = token_squares[t];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (quad == 0) squares[(8 * t + group) * kWarps + warp] = sum;
      }
    }

    // Add up the warps' sums. Two buffers in turn: one barrier per tile is enough, because the
    // barrier of the next tile comes after this tile's reads and before the buffer's next use.
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int tile = pass + r * kPairs;
      if (tile >= end_pair) break;
      float2* partials = reduce + buffer * kWarps * p.tokens * kPairs;
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int token = 8 * t + 2 * quad + j;
          if (token < p.tokens) {
            partials[(warp * p.tokens + token) * kPairs + group] = {
                sums[r][0][t][j] + (kChains > 1 ? sums[r][kChains - 1][t][j] : 0.f),
                sums[r][0][t][j + 2] + (kChains > 1 ? sums[r][kChains - 1][t][j + 2] : 0.f)};
          }
        }
      }
      __syncthreads();
      const bool stores = out_token < p.tokens && tile + out_pair < end_pair;
      if (normalizes && stores && first_pass && r == 0) {
        scale = norm_scale(p, squares, out_token,
                           kResident ? 1 << warps_per_token_log2(p.tokens) : kWarps);
      }
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
      if (r + 1 < kRowTiles) load_operands(tile + kPairs);
      buffer ^= 1;
    }
  }
  copy_async_wait<0>();
}

// ---- Host ---------------------------------------------------------------------------------------

constexpr int kStaticBytes = kMaxTokens * kWarps * 4;  // of shared memory, `squares`

inline int shared_bytes(const TokensParams& in, bool resident, bool deep = false) {
  const int ring = kWarps * kStageBytes * stages_of(runs_sm90_code(), deep);
  const int tokens = resident ? in.tokens * padded_k(in.k) * 2 : 0;
  const int norm = in.norm_weight ? padded_k(in.k) * 2 : 0;
  return ring + kReduceBytes * in.tokens + tokens + norm;
}

// Whether a block finds room for the tokens, or else at least for the norm's weights. On 9.0 two
// blocks must fit into an SM.
inline bool fits(const TokensParams& in, bool resident) {
  const int limit = runs_sm90_code() ? 113 * 1024 : device_properties().max_shared_per_block;
  return shared_bytes(in, resident) <= limit - kStaticBytes;
}

// Whether a block with a deep ring finds room on an SM beside one of a linear that takes as many
// tokens, of k = `next_k`.
inline bool fits_deep(const TokensParams& in, int64_t next_k) {
  if (!runs_sm90_code() || next_k > 1 << 16) return false;
  TokensParams next = in;
  next.norm_weight = nullptr;
  next.k = static_cast<int>(next_k);
  return fits(next, true) && shared_bytes(in, true, true) + shared_bytes(next, true) +
                                     2 * kStaticBytes <=
                                 226 * 1024;
}

template <typename T, typename Job>
void launch_stream_linear(TokensParams in, const Job& job, cudaStream_t stream) {
  const int pairs = job.pairs();
  if (tokens_need_scratch(in)) {
    launch_normalize_tokens(in, stream);
    in.x = in.scratch;
    in.norm_weight = nullptr;
  }
  const bool resident = fits(in, true);
  const bool one = in.tokens <= 8;
  bool deep = false;
  auto kernel = stream_linear_kernel<T, Job, 1, true>;
  if constexpr (Job::kMergesParts) {
    TTF_CHECK(resident, "a token of ", in.k, " elements does not fit into shared memory");
  } else {
    if (resident && !one) kernel = stream_linear_kernel<T, Job, 2, true>;
    if (!resident && one) kernel = stream_linear_kernel<T, Job, 1, false>;
    if (!resident && !one) kernel = stream_linear_kernel<T, Job, 2, false>;
  }
  if constexpr (Job::kMayBeDeep) {
    deep = resident && one && fits_deep(in, job.next_k());
    if (deep) kernel = stream_linear_kernel<T, Job, 1, true, true>;
  }
  const int bytes = shared_bytes(in, resident, deep);
  allow_shared_memory(kernel, bytes);
  const int blocks = std::min(pairs, device_properties().num_sms);
  launch_chained(kernel, blocks, kLinearThreads, bytes, stream, in, job);
}

}  // namespace torchtune_fused
