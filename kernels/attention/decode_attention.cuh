// Attention of one or a few queries over a KV cache; the floor is the bytes of the keys and values.
//
// A row tile is up to 16 (query head, step) rows that share a key head: the heads of its group,
// packed as the 16 rows of an mma, so that the cache is read once for all of them.
// Grid: (splits, kv_heads * row tiles, batch). Block: 4 warps. The keys of a row tile are split
// over the blocks, and within a block over the warps, in units of 16 keys; how many of the splits
// have work follows from the length, which is read on the device: one captured launch serves every
// length. Each warp keeps its own online softmax (Dao et al., FlashAttention-2, 2023) over its own
// units, which stream through its own ring of shared memory: K of a unit, V of it, K of the next.
// The warps' results are merged in shared memory, and the blocks' by a second, small kernel
// (Dao et al., Flash-Decoding, 2023). Slots beyond the length are never read.
#pragma once

#include "attention/attention.h"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/vec.cuh"

namespace torchtune_fused {

constexpr int kRows = 16;        // query rows in a tile
constexpr int kUnit = 16;        // keys in a unit
constexpr int kAttnWarps = 4;
constexpr int kAttnThreads = 32 * kAttnWarps;
constexpr int kCombineThreads = 256;

// Slots of a warp's ring: two blocks fit into an SM of 9.0 or 8.0, one into 8.6's.
template <int D>
constexpr int kSlots = D == 64 ? 8 : D <= 96 ? 6 : D == 128 ? 4 : 2;
// A row of keys in shared memory is padded by 16 bytes, which spreads 8 rows over all banks.
template <int D>
constexpr int kRowBytes = 2 * D + 16;
template <int D>
constexpr int kSlotBytes = kUnit * kRowBytes<D>;
template <int D>
constexpr int kMergeStride = D + 8;  // floats of a row of a warp's result, spread likewise
template <int D>
constexpr int kAttnShared = 2 * kAttnWarps * kRows * 4 +
                            (kAttnWarps * kSlots<D> * kSlotBytes<D> >
                                     kAttnWarps * kRows * kMergeStride<D> * 4
                                 ? kAttnWarps * kSlots<D> * kSlotBytes<D>
                                 : kAttnWarps * kRows * kMergeStride<D> * 4);

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

// How many of the splits have work: each warp of a split gets at least one unit.
__device__ __forceinline__ int active_splits(const DecodeAttentionParams& p, UnitRange units) {
  return min(max((units.end - units.begin + kAttnWarps - 1) / kAttnWarps, 1), p.splits);
}

__device__ __forceinline__ UnitRange units_of_split(UnitRange units, unsigned split,
                                                     unsigned active) {
  const unsigned n = units.end - units.begin;
  return {units.begin + static_cast<int>(n * split / active),
          units.begin + static_cast<int>(n * (split + 1) / active)};
}

__device__ __forceinline__ int filled_slots(const DecodeAttentionParams& p) {
  const long long length = __ldcg(reinterpret_cast<const long long*>(p.length));
  return static_cast<int>(length < 0 ? 0 : length < p.max_len ? length : p.max_len);
}

template <typename T, int D>
__global__ void __launch_bounds__(kAttnThreads)
    decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p) {
  launch_dependents();
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group_row = lane / 4, quad = lane % 4;
  const int split = blockIdx.x, row_tile = blockIdx.y % row_tiles(p);
  const int kv_head = blockIdx.y / row_tiles(p), batch = blockIdx.z;
  const T* k_head = static_cast<const T*>(p.k) + batch * p.k_stride[0] + kv_head * p.k_stride[1];
  const T* v_head = static_cast<const T*>(p.v) + batch * p.v_stride[0] + kv_head * p.v_stride[1];

  wait_for_grid();

  const int length = filled_slots(p);
  const UnitRange all = visible_units(p, length, row_tile);
  const int active = active_splits(p, all);
  if (split >= active) return;
  const UnitRange mine = units_of_split(all, split, active);

  // This lane's two rows of the tile, g and g + 8, and the slots that each may see.
  const int heads_per_group = p.heads / p.kv_heads;
  const int rows = min(kRows, heads_per_group * p.steps - row_tile * kRows);
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
    mask_row[i] = p.mask && row < rows
                      ? p.mask + batch * p.mask_stride[0] + head * p.mask_stride[1] +
                            step * p.mask_stride[2]
                      : nullptr;
    q_row[i] = row < rows ? static_cast<const T*>(p.q) + batch * p.q_stride[0] +
                                head * p.q_stride[1] + step * p.q_stride[2]
                          : nullptr;
  }

  // The producer: items 2i and 2i + 1 are the keys and the values of this warp's unit i.
  float* stat_max = reinterpret_cast<float*>(shared);  // [warp][row]
  float* stat_sum = stat_max + kAttnWarps * kRows;
  unsigned char* pool = shared + 2 * kAttnWarps * kRows * 4;
  const uint32_t ring = shared_address(pool) + warp * kSlots<D> * kSlotBytes<D>;
  int load_unit = mine.begin + warp;
  bool load_values = false;
  const auto load_item = [&](int slot) {
    if (load_unit < mine.end) {
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
      if (load_values) load_unit += kAttnWarps;
      load_values = !load_values;
    }
    copy_async_commit();
  };
#pragma unroll
  for (int slot = 0; slot < kSlots<D>; ++slot) load_item(slot);

  // Q as A fragments.
  uint32_t q[D / 16][4];
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* row = q_row[i % 2];
      q[kk][i] = row == nullptr ? 0
                                : __ldcg(reinterpret_cast<const unsigned*>(
                                      row + kk * 16 + i / 2 * 8 + quad * 2));
    }
  }

  float out[D / 8][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f};
  const float scale = static_cast<float>(p.scale * 1.4426950408889634);  // exp2 instead of exp
  int slot = 0;
  const auto next_slot = [&] { slot = slot + 1 == kSlots<D> ? 0 : slot + 1; };
  for (int unit = mine.begin + warp; unit < mine.end; unit += kAttnWarps) {
    // S = Q K^T: 16 rows by 16 keys.
    copy_async_wait<kSlots<D> - 1>();
    __syncwarp();
    float s[2][4] = {};
    const uint32_t keys = ring + slot * kSlotBytes<D> +
                          (lane % 8 + lane / 16 * 8) * kRowBytes<D> + lane / 8 % 2 * 16;
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
    copy_async_wait<kSlots<D> - 1>();
    __syncwarp();
    const uint32_t values = ring + slot * kSlotBytes<D> + lane % 16 * kRowBytes<D> + lane / 16 * 16;
#pragma unroll
    for (int dd = 0; dd < D / 16; ++dd) {
      uint32_t b[4];
      load_matrix_x4_transposed(b, values + dd * 32);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float(&o)[4] = out[2 * dd + t];
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

  // Merge the warps: bring all to the largest maximum, and add up.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row_sum[i] += __shfl_xor_sync(~0u, row_sum[i], 1);
    row_sum[i] += __shfl_xor_sync(~0u, row_sum[i], 2);
    if (quad == 0) {
      stat_max[warp * kRows + group_row + 8 * i] = row_max[i];
      stat_sum[warp * kRows + group_row + 8 * i] = row_sum[i];
    }
  }
  __syncthreads();  // the statistics are there, and nobody needs the rings any more
  float* merge = reinterpret_cast<float*>(pool);  // [warp][row][kMergeStride]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = group_row + 8 * i;
    if (row >= rows) continue;
    float block_max = -INFINITY;
    for (int w = 0; w < kAttnWarps; ++w) block_max = fmaxf(block_max, stat_max[w * kRows + row]);
    const float factor = block_max == -INFINITY ? 0.f : exp2f(row_max[i] - block_max);
    float* target = merge + (warp * kRows + row) * kMergeStride<D> + quad * 2;
#pragma unroll
    for (int t = 0; t < D / 8; ++t) {
      *reinterpret_cast<float2*>(target + t * 8) = {out[t][2 * i] * factor,
                                                    out[t][2 * i + 1] * factor};
    }
  }
  __syncthreads();
  const int64_t tile = static_cast<int64_t>(batch) * gridDim.y + blockIdx.y;
  for (int i = threadIdx.x; i < rows * (D / 4); i += kAttnThreads) {
    const int row = i / (D / 4), column = i % (D / 4) * 4;
    float block_max = -INFINITY, sum = 0.f;
    for (int w = 0; w < kAttnWarps; ++w) block_max = fmaxf(block_max, stat_max[w * kRows + row]);
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < kAttnWarps; ++w) {
      if (block_max != -INFINITY) {
        sum += stat_sum[w * kRows + row] * exp2f(stat_max[w * kRows + row] - block_max);
      }
      const float4 v =
          *reinterpret_cast<const float4*>(merge + (w * kRows + row) * kMergeStride<D> + column);
      total = {total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w};
    }
    if (p.splits == 1) {
      const float inverse = sum > 0.f ? 1.f / sum : 0.f;  // a row that sees nothing gives zeros
      const int step = (row_tile * kRows + row) / heads_per_group;
      const int head = kv_head * heads_per_group + (row_tile * kRows + row) % heads_per_group;
      T* target = static_cast<T*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] +
                  step * p.out_stride[2] + column;
      *reinterpret_cast<uint2*>(target) = {pack<T>(total.x * inverse, total.y * inverse),
                                           pack<T>(total.z * inverse, total.w * inverse)};
    } else {
      const int64_t at = (tile * p.splits + split) * kRows + row;
      *reinterpret_cast<float4*>(p.partial_out + at * D + column) = total;
      if (column == 0) p.partial_stat[at] = {block_max, sum};
    }
  }
}

// Adds up the splits of one query row. Grid: (heads * steps, batch). Block: groups of D / 4 threads;
// each group takes every so-manieth split, in batches whose loads are all under way at once, and
// the groups are merged in shared memory.
template <typename T, int D>
__global__ void __launch_bounds__(kCombineThreads)
    combine_splits_kernel(const __grid_constant__ DecodeAttentionParams p) {
  launch_dependents();
  constexpr int kLanes = D / 4, kGroups = kCombineThreads / kLanes, kBatch = 4;
  __shared__ float4 outs[kGroups][kLanes];
  __shared__ float2 stats[kGroups];
  const int heads_per_group = p.heads / p.kv_heads;
  const int head = blockIdx.x / p.steps, step = blockIdx.x % p.steps, batch = blockIdx.y;
  const int row_in_group = step * heads_per_group + head % heads_per_group;
  const int row_tile = row_in_group / kRows, row = row_in_group % kRows;
  const int tile = (batch * p.kv_heads + head / heads_per_group) * row_tiles(p) + row_tile;
  const int64_t first = static_cast<int64_t>(tile) * p.splits * kRows + row;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  wait_for_grid();

  const int length = filled_slots(p);
  float maximum = -INFINITY, sum = 0.f;
  float4 out = {0.f, 0.f, 0.f, 0.f};
  for (int i = group; i < p.splits; i += kBatch * kGroups) {
    // Loaded whether the split has work or not: else the length would have to arrive first.
    float2 stat[kBatch];
    float4 part[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int64_t at = first + min(i + j * kGroups, p.splits - 1) * kRows;
      stat[j] = __ldcg(p.partial_stat + at);
      part[j] = __ldcg(reinterpret_cast<const float4*>(p.partial_out + at * D) + lane);
    }
    const int active = active_splits(p, visible_units(p, length, row_tile));
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (i + j * kGroups >= active || stat[j].x == -INFINITY) continue;
      const float new_maximum = fmaxf(maximum, stat[j].x);
      const float decay = exp2f(maximum - new_maximum), factor = exp2f(stat[j].x - new_maximum);
      maximum = new_maximum;
      sum = sum * decay + stat[j].y * factor;
      out = {out.x * decay + part[j].x * factor, out.y * decay + part[j].y * factor,
             out.z * decay + part[j].z * factor, out.w * decay + part[j].w * factor};
    }
  }
  if (group < kGroups) {
    outs[group][lane] = out;
    if (lane == 0) stats[group] = {maximum, sum};
  }
  __syncthreads();
  if (group != 0) return;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) maximum = fmaxf(maximum, stats[g].x);
  sum = 0.f;
  out = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const float factor = stats[g].x == -INFINITY ? 0.f : exp2f(stats[g].x - maximum);
    const float4 v = outs[g][lane];
    sum += stats[g].y * factor;
    out = {out.x + v.x * factor, out.y + v.y * factor, out.z + v.z * factor, out.w + v.w * factor};
  }
  const float inverse = sum > 0.f ? 1.f / sum : 0.f;  // a row that sees nothing gives zeros
  T* target = static_cast<T*>(p.out) + batch * p.out_stride[0] + head * p.out_stride[1] +
              step * p.out_stride[2] + lane * 4;
  *reinterpret_cast<uint2*>(target) = {pack<T>(out.x * inverse, out.y * inverse),
                                       pack<T>(out.z * inverse, out.w * inverse)};
}

// Instantiated once per head dimension, each in a file of its own.
template <int D>
struct DecodeAttention {
  static int blocks_per_sm(DType dtype);
  static void launch(const DecodeAttentionParams& params, cudaStream_t stream);
};

template <int D>
int DecodeAttention<D>::blocks_per_sm(DType dtype) {
  const auto kernel = dtype == DType::kFloat16 ? decode_attention_kernel<__half, D>
                                               : decode_attention_kernel<__nv_bfloat16, D>;
  allow_shared_memory(kernel, kAttnShared<D>);
  int blocks = 0;
  TTF_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kAttnThreads,
                                                               kAttnShared<D>));
  return blocks;
}

template <int D>
void DecodeAttention<D>::launch(const DecodeAttentionParams& p, cudaStream_t stream) {
  const bool half = p.dtype == DType::kFloat16;
  const auto kernel =
      half ? decode_attention_kernel<__half, D> : decode_attention_kernel<__nv_bfloat16, D>;
  const auto combine =
      half ? combine_splits_kernel<__half, D> : combine_splits_kernel<__nv_bfloat16, D>;
  const int tiles = (p.heads / p.kv_heads * p.steps + kRows - 1) / kRows;
  allow_shared_memory(kernel, kAttnShared<D>);
  launch_chained(kernel, dim3(p.splits, p.kv_heads * tiles, p.batch), kAttnThreads, kAttnShared<D>,
                 stream, p);
  if (p.splits > 1) {
    allow_shared_memory(combine, 0);
    launch_chained(combine, dim3(p.heads * p.steps, p.batch), kCombineThreads, 0, stream, p);
  }
}

}  // namespace torchtune_fused
