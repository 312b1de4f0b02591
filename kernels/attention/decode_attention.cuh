// Attention of one or a few queries over a KV cache; the floor is the bytes of the keys and values.
//
// A row tile is up to 16 (query head, step) rows that share a key head: the heads of its group,
// packed as the 16 rows of an mma, so that the cache is read once for all of them.
// Grid: a block for each split of each row tile, at most one per SM if they can run at once. Block:
// 4 warps. The keys of a row tile are dealt to the warps of its splits by turns, in units of 16, so
// that what is read at a time lies together; how many of the splits have work follows from the
// length, which is read on the device: one captured launch serves every length. Each warp keeps its
// own online softmax (Dao et al., FlashAttention-2, 2023) over its own units, which stream through
// its own ring of shared memory: K of a unit, V of it, K of the next. The warps' results are merged
// in shared memory, and the splits' by their blocks, each for a share of the columns, always in the
// same order (after Dao et al., Flash-Decoding, 2023): on 9.0, two splits form a cluster and store
// into each other's shared memory; more go through global memory. Slots beyond the length are never
// read.
#pragma once

#include <algorithm>

#include "attention/attention.h"
#include "attention/decode_exchange.cuh"
#include "attention/decode_inbox.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace torchtune_fused {

constexpr int kUnit = 16;       // keys in a unit
constexpr int kMergeBatch = 4;  // partial results of a row that are read at once
constexpr int kAttnWarps = 4;
constexpr int kAttnThreads = 32 * kAttnWarps;
constexpr int kLeastUnits = 2;  // of a warp: merging splits costs more than reading so few

// A row of keys in shared memory is padded by 16 bytes, which spreads 8 rows over all banks.
template <int D>
constexpr int kRowBytes = 2 * D + 16;
template <int D>
constexpr int kSlotBytes = kUnit * kRowBytes<D>;
// Slots of a warp's ring. On 9.0 a block takes half of an SM, so that the blocks of the kernels
// before and after in the chain find the other half; where it has half of a row tile's keys or all,
// and runs long, it takes a third. Before 9.0 it must do with the 99 KB of 8.6.
template <int D>
__host__ __device__ constexpr int slots_of(bool sm90, bool clustered) {
  const int kilobytes = !sm90 ? 98 : clustered ? 74 : 113;
  return kilobytes * 1024 / (kAttnWarps * kSlotBytes<D>);
}
template <int D>
constexpr int kMergeStride = D + 8;  // floats of a row of a warp's result, spread likewise
// Bytes of shared memory: the statistics, and the rings or what they make room for in the end.
template <int D>
constexpr int attention_shared(int slots) {
  const int rings = kAttnWarps * slots * kSlotBytes<D>;
  const int merge = kAttnWarps * kRows * kMergeStride<D> * 4;
  return 2 * kAttnWarps * kRows * 4 + (rings > merge ? rings : merge);
}

// The units of keys that one block reads.
struct UnitRange {
  int begin, end;
};

__device__ __forceinline__ int row_tiles(const DecodeAttentionParams& p) {
  return (p.heads / p.kv_heads * p.steps + kRows - 1) / kRows;
}

// Slots [first, last) that any row of the tile may see, in units.
__device__ __forceinline__ UnitRange visible_units(const DecodeAttentionParams& p, int length,
                                                   int row_tile) {
  const int group = p.heads / p.kv_heads;
  const int first_step = row_tile * kRows / group;
  const int last_step = min((row_tile * kRows + kRows - 1) / group, p.steps - 1);
  const int start = length - p.steps;  // the slot of step 0
  const int last = p.mask ? length : start + last_step + 1;
  const int first = p.window ? max(start + first_step - p.window + 1, 0) : 0;
  if (last <= first) return {0, 0};
  return {first / kUnit, (last + kUnit - 1) / kUnit};
}

// How many of the splits have work.
__device__ __forceinline__ int active_splits(const DecodeAttentionParams& p, UnitRange units) {
  constexpr int kLeast = kAttnWarps * kLeastUnits;
  return min(max((units.end - units.begin + kLeast - 1) / kLeast, 1), p.splits);
}

__device__ __forceinline__ int filled_slots(const DecodeAttentionParams& p) {
  const long long length = __ldcg(reinterpret_cast<const long long*>(p.length));
  return static_cast<int>(length < 0 ? 0 : length < p.max_len ? length : p.max_len);
}

// Four columns of the sum of a row of a group, divided by the sum of its probabilities.
template <typename T>
__device__ __forceinline__ void store_row(const DecodeAttentionParams& p, int batch, int kv_head,
                                          int row_in_group, int column, const Partial& sum) {
  // A row that sees nothing gives zeros.
  const float inverse = sum.weight > 0.f ? 1.f / sum.weight : 0.f;
  const int heads_per_group = p.heads / p.kv_heads;
  const int step = row_in_group / heads_per_group;
  const int head = kv_head * heads_per_group + row_in_group % heads_per_group;
  T* target = static_cast<T*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] +
              step * p.out_stride[2] + column;
  const float4 out = sum.out;
  *reinterpret_cast<uint2*>(target) = {pack<T>(out.x * inverse, out.y * inverse),
                                       pack<T>(out.z * inverse, out.w * inverse)};
}

template <typename T, int D, bool kClustered>
__global__ void __launch_bounds__(kAttnThreads, 1)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p) {
#if __CUDA_ARCH__ >= 900
  constexpr int kSlots = slots_of<D>(true, kClustered);
#else
  constexpr int kSlots = slots_of<D>(false, kClustered);
#endif
  launch_dependents();
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group_row = lane / 4, quad = lane % 4;
  const int64_t tile = blockIdx.x / p.splits;
  const int split = blockIdx.x % p.splits, row_tile = tile % row_tiles(p);
  const int kv_head = tile / row_tiles(p) % p.kv_heads;
  const int batch = tile / row_tiles(p) / p.kv_heads;
  const T* k_head = static_cast<const T*>(p.k) + batch * p.k_stride[0] + kv_head * p.k_stride[1];
  const T* v_head = static_cast<const T*>(p.v) + batch * p.v_stride[0] + kv_head * p.v_stride[1];

  if (!p.reads_ahead) wait_for_grid();
  const int length = filled_slots(p);
  if (batch >= p.batch) {
    wait_for_grid();
    return;  // a block that only keeps the place of one
  }
  const UnitRange all = visible_units(p, length, row_tile);
  const int active = active_splits(p, all);
  const int heads_per_group = p.heads / p.kv_heads;
  const int rows = min(kRows, heads_per_group * p.steps - row_tile * kRows);
  const Inbox inbox(shared, p, rows, active);
  if constexpr (kClustered) {
    if (threadIdx.x == 0) inbox.open(split, active);
    __syncwarp();
    cluster_arrive();
  }
  if (split >= active) {
    wait_for_grid();
    return;
  }
  // All splits go through the keys together, so that what they read at a time lies together.
  const int first_unit = all.begin + split * kAttnWarps + warp, unit_step = active * kAttnWarps;

  // This lane's two rows of the tile, g and g + 8, and the slots that each may see.
  int first_slot[2], last_slot[2];  // [first, last)
  const unsigned char* mask_row[2];
  const T* q_row[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = group_row + 8 * i;
    const int step = (row_tile * kRows + row) / heads_per_group;
    const int head = kv_head * heads_per_group + (row_tile * kRows + row) % heads_per_group;
    const int slot = length - p.steps + step;
    last_slot[i] = row >= rows ? 0 : p.mask ? length : slot + 1;
    first_slot[i] = p.window ? slot - p.window + 1 : 0;
    mask_row[i] = p.mask && row < rows ? p.mask + batch * p.mask_stride[0] +
                                             head * p.mask_stride[1] + step * p.mask_stride[2]
                                       : nullptr;
    q_row[i] = row < rows ? static_cast<const T*>(p.q) + batch * p.q_stride[0] +
                                head * p.q_stride[1] + step * p.q_stride[2]
                          : nullptr;
  }

  // The producer: items 2i and 2i + 1 are the keys and the values of this warp's unit i.
  unsigned char* pool = shared + (kClustered ? p.inbox_bytes : 0);
  float2* stats = reinterpret_cast<float2*>(pool);  // [warp][row]: maximum, sum
  pool += 2 * kAttnWarps * kRows * 4;
  const uint32_t ring = shared_address(pool) + warp * kSlots * kSlotBytes<D>;
  int load_unit = first_unit;
  bool load_values = false;
  const auto load_item = [&](int slot) {
    if (load_unit < all.end) {
      const int first = load_unit * kUnit;
      const int stride = static_cast<int>(load_values ? p.v_stride[2] : p.k_stride[2]);
      const T* unit = (load_values ? v_head : k_head) + static_cast<int64_t>(first) * stride;
      constexpr int kPieces = D / 8;
#pragma unroll
      for (int i = 0; i < kUnit * kPieces / 32; ++i) {
        const int row = (lane + 32 * i) / kPieces, piece = (lane + 32 * i) % kPieces;
        const bool valid = first + row < length;
        copy_async_16(ring + slot * kSlotBytes<D> + row * kRowBytes<D> + piece * 16,
                      unit + (valid ? row * stride + piece * 8 : 0), valid);
      }
      if (load_values) load_unit += unit_step;
      load_values = !load_values;
    }
    copy_async_commit();
  };
  int filled = 0;
  if (p.reads_ahead) {
    const int old = length - p.steps;  // slots that earlier steps wrote
#pragma unroll 1
    for (; filled < kSlots && (load_unit + 1) * kUnit <= old; ++filled) load_item(filled);
    // The old slots of the unit that the new ones begin in come into L2, at least.
    const int row = load_unit * kUnit + lane % kUnit;
    if (load_unit == old / kUnit && load_unit < all.end && row < old) {
      const T* key_or_value =
          lane < kUnit ? k_head + row * p.k_stride[2] : v_head + row * p.v_stride[2];
#pragma unroll
      for (int column = 0; column < D; column += 64) prefetch_l2(key_or_value + column);
    }
    wait_for_grid();
  }
#pragma unroll 1
  for (; filled < kSlots; ++filled) load_item(filled);

  // Q as A fragments.
  uint32_t q[D / 16][4];
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* row = q_row[i % 2];
      q[kk][i] =
          row == nullptr
              ? 0
              : __ldcg(reinterpret_cast<const unsigned*>(row + kk * 16 + i / 2 * 8 + quad * 2));
    }
  }

  float out[D / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f};
  const float scale = static_cast<float>(p.scale * 1.4426950408889634);  // exp2 instead of exp
  int slot = 0;
  const auto next_slot = [&] { slot = slot + 1 == kSlots ? 0 : slot + 1; };
  for (int unit = first_unit; unit < all.end; unit += unit_step) {
    // S = Q K^T: 16 rows by 16 keys.
    copy_async_wait<kSlots - 1>();
    __syncwarp();
    float s[2][4] = {};
    const uint32_t keys =
        ring + slot * kSlotBytes<D> + (lane % 8 + lane / 16 * 8) * kRowBytes<D> + lane / 8 % 2 * 16;
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t b[4];
      load_matrix_x4(b, keys + kk * 32);
      mma_16x8x16<T>(s[0], q[kk][0], q[kk][1], q[kk][2], q[kk][3], b[0], b[1]);
      mma_16x8x16<T>(s[1], q[kk][0], q[kk][1], q[kk][2], q[kk][3], b[2], b[3]);
    }
    __syncwarp();
    load_item(slot);
    next_slot();

    // Mask, and the online softmax of rows g (i = 0) and g + 8 (i = 1).
    uint32_t probability[2][2];  // [key tile][row]
    float decay[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float tile_max = -INFINITY;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = unit * kUnit + t * 8 + quad * 2 + j;
          const bool visible = key < last_slot[i] && key >= first_slot[i] &&
                               (mask_row[i] == nullptr || mask_row[i][key]);
          float& logit = s[t][2 * i + j];
          logit = visible ? logit * scale : -INFINITY;
          tile_max = fmaxf(tile_max, logit);
        }
      }
      tile_max = fmaxf(tile_max, __shfl_xor_sync(~0u, tile_max, 1));
      tile_max = fmaxf(tile_max, __shfl_xor_sync(~0u, tile_max, 2));
      const float new_max = fmaxf(row_max[i], tile_max);
      const float base = new_max == -INFINITY ? 0.f : new_max;
      decay[i] = exp2f(row_max[i] - base);
      row_max[i] = new_max;
      float sum = 0.f;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float low = exp2f(s[t][2 * i] - base), high = exp2f(s[t][2 * i + 1] - base);
        sum += low + high;
        probability[t][i] = pack<T>(low, high);
      }
      row_sum[i] = row_sum[i] * decay[i] + sum;  // of this lane's keys; the quad is added up last
    }

    // out = out * decay + P V.
    copy_async_wait<kSlots - 1>();
    __syncwarp();
    const uint32_t values = ring + slot * kSlotBytes<D> + lane % 16 * kRowBytes<D> + lane / 16 * 16;
#pragma unroll
    for (int dd = 0; dd < D / 16; ++dd) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, values + dd * 32);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float (&o)[4] = out[2 * dd + t];
        o[0] *= decay[0];
        o[1] *= decay[0];
        o[2] *= decay[1];
        o[3] *= decay[1];
        mma_16x8x16<T>(o, probability[0][0], probability[0][1], probability[1][0],
                       probability[1][1], b[2 * t], b[2 * t + 1]);
      }
    }
    __syncwarp();
    load_item(slot);
    next_slot();
  }
  copy_async_wait<0>();
  if constexpr (kClustered) cluster_wait();  // all inboxes are open

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row_sum[i] += __shfl_xor_sync(~0u, row_sum[i], 1);
    row_sum[i] += __shfl_xor_sync(~0u, row_sum[i], 2);
    if (quad == 0) {
      stats[warp * kRows + group_row + 8 * i] = {row_max[i], row_sum[i]};
    }
  }
  __syncthreads();  // the statistics are there, and nobody needs the rings any more
  float* merge = reinterpret_cast<float*>(pool);  // [warp][row][kMergeStride]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = group_row + 8 * i;
    if (row >= rows) continue;
    float* target = merge + (warp * kRows + row) * kMergeStride<D> + quad * 2;
#pragma unroll
    for (int t = 0; t < D / 8; ++t) {
      *reinterpret_cast<float2*>(target + t * 8) = {out[t][2 * i], out[t][2 * i + 1]};
    }
  }
  __syncthreads();

  // In a cluster twice through the same code, which is so found in the cache: first the warps'
  // results are merged, then, by each block for its share, those of the splits.
  const Exchange<D> exchange(p, tile);
  const float2* from_stats = stats;
  const float* from_outs = merge;
  int count = kAttnWarps, stat_stride = kRows, out_stride = kRows * kMergeStride<D>;
  int begin = 0, end = inbox.pieces;
#pragma unroll 1
  for (bool of_warps = true;; of_warps = false) {
    const bool final = active == 1 || !of_warps;
#pragma unroll 1
    for (int i = begin + threadIdx.x; i < end; i += kAttnThreads) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      const float2* stat_at = from_stats + (of_warps ? row : i - begin);
      const float* out_at =
          from_outs + (of_warps ? row * kMergeStride<D> + column : (i - begin) * 4);
      Partial own;
#pragma unroll 1
      for (int first = 0; first < count; first += kMergeBatch) {
        float2 stat[kMergeBatch];
        float4 part[kMergeBatch];
#pragma unroll
        for (int j = 0; j < kMergeBatch; ++j) {
          const int at = min(first + j, count - 1);
          stat[j] = stat_at[at * stat_stride];
          part[j] = *reinterpret_cast<const float4*>(out_at + at * out_stride);
        }
#pragma unroll
        for (int j = 0; j < kMergeBatch; ++j) {
          if (first + j < count) own.add(stat[j], part[j]);
        }
      }
      if (final) {
        store_row<T>(p, batch, kv_head, row_tile * kRows + row, column, own);
      } else if constexpr (kClustered) {
        inbox.send(split, i, own.out, own.stat());
      } else {
        exchange.send(split, row, column, own);
      }
    }
    if (final) return;
    begin = inbox.begin(split);
    end = inbox.begin(split + 1);
    if constexpr (!kClustered) {
      exchange.meet(active);
      exchange.for_merged(begin, end, active, [&](int row, int column, const Partial& all) {
        store_row<T>(p, batch, kv_head, row_tile * kRows + row, column, all);
      });
      return;
    } else {
      wait(*inbox.full, 0);
      from_stats = inbox.stats;
      from_outs = reinterpret_cast<const float*>(inbox.outs);
      stat_stride = inbox.share;
      out_stride = 4 * inbox.share;
      count = active;
    }
  }
}

// Instantiated once per head dimension, each in a file of its own; for clusters in
// decode_attention_sm90.cu.
template <int D, bool kClustered>
struct DecodeAttention {
  static void launch(const DecodeAttentionParams& params, cudaStream_t stream);
};

template <int D, bool kClustered>
void DecodeAttention<D, kClustered>::launch(const DecodeAttentionParams& p, cudaStream_t stream) {
  const auto kernel = p.dtype == DType::kFloat16
                          ? decode_attention_kernel<__half, D, kClustered>
                          : decode_attention_kernel<__nv_bfloat16, D, kClustered>;
  // At least a block on every SM, even if without work: else the next kernel would be put there,
  // with two of its blocks on some SMs and none on others.
  const int64_t tiles = (p.heads / p.kv_heads * p.steps + kRows - 1) / kRows;
  const int cluster = kClustered ? p.splits : 1;
  const int64_t blocks = std::max<int64_t>(p.batch * p.kv_heads * tiles * p.splits,
                                           device_properties().num_sms / cluster * cluster);
  const int bytes = (kClustered ? p.inbox_bytes : 0) +
                    attention_shared<D>(slots_of<D>(runs_sm90_code(), kClustered));
  allow_shared_memory(kernel, bytes);
  launch_chained_in_clusters(kernel, cluster, dim3(static_cast<unsigned>(blocks)), kAttnThreads,
                             bytes, stream, p);
}

}  // namespace torchtune_fused
