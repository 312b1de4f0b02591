// Attention of one token, in parts that the output projection merges as it stages its token: the
// end of the grid is the only meeting of the splits.
//
// Grid: a block for each split of the keys of each key head. Block: 4 warps, to which the units of
// 16 keys go in turn, through a ring each in shared memory: K of a unit, V of it, K of the next.
// Few and small blocks on purpose: on an SM the block of the projection, with most of its weights,
// and that of the kernel after it find room beside them, so that memory is busy meanwhile.
//
// Tensor cores: keys are A (16 rows), the query heads of a group are B (8 columns), and then values
// (columns as rows) are A and probabilities B, transposed in registers: half the registers of
// padding the heads to 16 rows. Slots beyond the length are never read.
#include <algorithm>

#include "common/launch.h"
#include "decode/attention_parts.cuh"

namespace torchtune_fused {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxGroup = 8;
constexpr int kSlots = 4;  // of a warp's ring
constexpr int D = kAttendHeadDim;

// A row of keys in shared memory is padded by 16 bytes, which spreads 8 rows over all banks.
constexpr int kRowBytes = 2 * D + 16;
constexpr int kSlotBytes = kUnitKeys * kRowBytes;
constexpr int kMergeStride = D + 4;  // floats of a row of a warp's result, spread likewise
constexpr int kSharedBytes =
    std::max(kWarps * kSlots * kSlotBytes, kWarps * kMaxGroup * kMergeStride * 4);

template <typename T>
__global__ void __launch_bounds__(kThreads)
    decode_attend_kernel(const __grid_constant__ DecodeAttendParams p) {
  launch_dependents();
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float2 stats[kWarps][kMaxGroup];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = lane / 4, quad = lane % 4;
  const int kv_head = blockIdx.x / kMaxSplits, split = blockIdx.x % kMaxSplits;

  if (!p.parts.reads_ahead) wait_for_grid();
  const int length = filled_slots(p.parts);
  const int units = units_of(length), active = active_splits(length);
  if (split >= active) {
    wait_for_grid();
    return;
  }
  const int end = units * (split + 1) / active, first_unit = units * split / active + warp;
  const T* k_head = static_cast<const T*>(p.k) + kv_head * p.parts.max_len * D;
  const T* v_head = static_cast<const T*>(p.v) + kv_head * p.parts.max_len * D;

  // The producer: items 2i and 2i + 1 are the keys and the values of this warp's unit i.
  const uint32_t ring = shared_address(shared) + warp * kSlots * kSlotBytes;
  int load_unit = first_unit;
  bool load_values = false;
  const auto load_item = [&](int slot) {
    if (load_unit < end) {
      const T* unit = (load_values ? v_head : k_head) + load_unit * kUnitKeys * D;
      constexpr int kPieces = D / 8;
#pragma unroll
      for (int i = 0; i < kUnitKeys * kPieces / 32; ++i) {
        const int row = (lane + 32 * i) / kPieces, piece = (lane + 32 * i) % kPieces;
        const bool valid = load_unit * kUnitKeys + row < length;
        copy_async_16(ring + slot * kSlotBytes + row * kRowBytes + piece * 16,
                      unit + (valid ? row * D + piece * 8 : 0), valid);
      }
      if (load_values) load_unit += kWarps;
      load_values = !load_values;
    }
    copy_async_commit();
  };
  int filled = 0;
  if (p.parts.reads_ahead) {  // but for the last slot, which the kernel ahead is writing
#pragma unroll 1
    for (; filled < kSlots && (load_unit + 1) * kUnitKeys < length; ++filled) load_item(filled);
    wait_for_grid();
  }
#pragma unroll 1
  for (; filled < kSlots; ++filled) load_item(filled);

  // Q as B fragments: head `group` of the key head's.
  uint32_t q[D / 16][2];
  const T* q_row = static_cast<const T*>(p.q) + (kv_head * p.parts.group + group) * D + quad * 2;
#pragma unroll
  for (int kk = 0; kk < D / 16; ++kk) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      q[kk][i] = 0;
      if (group < p.parts.group) {
        q[kk][i] = __ldcg(reinterpret_cast<const unsigned*>(q_row + kk * 16 + i * 8));
      }
    }
  }

  // Of heads 2 quad and 2 quad + 1: columns `group` and `group` + 8 of each 16 (out), all keys of
  // the unit (maximum), and this lane's keys (sum).
  float out[D / 16][4] = {};
  float head_max[2] = {-INFINITY, -INFINITY}, head_sum[2] = {0.f, 0.f};
  const float scale = static_cast<float>(p.scale * 1.4426950408889634);  // exp2 instead of exp
  int slot = 0;
  const auto next_slot = [&] { slot = slot + 1 == kSlots ? 0 : slot + 1; };
#pragma unroll 1
  for (int unit = first_unit; unit < end; unit += kWarps) {
    // S = K Q^T: 16 keys by 8 heads.
    copy_async_wait<kSlots - 1>();
    __syncwarp();
    float s[4] = {};
    const uint32_t keys =
        ring + slot * kSlotBytes + lane % 16 * kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int kk = 0; kk < D / 16; ++kk) {
      uint32_t a[4];
      load_matrix_x4(a, keys + kk * 32);
      mma_16x8x16<T>(s, a[0], a[1], a[2], a[3], q[kk][0], q[kk][1]);
    }
    __syncwarp();
    load_item(slot);
    next_slot();

    // Mask, and the online softmax of the two heads over the 16 keys.
    const int key = unit * kUnitKeys + group;
    const bool visible[2] = {key < length && (p.mask == nullptr || p.mask[key]),
                             key + 8 < length && (p.mask == nullptr || p.mask[key + 8])};
    float decay[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float &low = s[j], &high = s[2 + j];
      low = visible[0] ? low * scale : -INFINITY;
      high = visible[1] ? high * scale : -INFINITY;
      float unit_max = fmaxf(low, high);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) {
        unit_max = fmaxf(unit_max, __shfl_xor_sync(~0u, unit_max, offset));
      }
      const float new_max = fmaxf(head_max[j], unit_max);
      const float base = new_max == -INFINITY ? 0.f : new_max;
      decay[j] = exp2f(head_max[j] - base);
      head_max[j] = new_max;
      low = exp2f(low - base);
      high = exp2f(high - base);
      head_sum[j] = head_sum[j] * decay[j] + low + high;
    }
    const uint32_t probability[2] = {transpose_matrix(pack<T>(s[0], s[1])),
                                     transpose_matrix(pack<T>(s[2], s[3]))};

    // out = out * decay + V^T P.
    copy_async_wait<kSlots - 1>();
    __syncwarp();
    const uint32_t values = ring + slot * kSlotBytes +
                            (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int dd = 0; dd < D / 16; ++dd) {
      uint32_t a[4];
      load_matrix_x4_transposed(a, values + dd * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[dd][i] *= decay[i % 2];
      mma_16x8x16<T>(out[dd], a[0], a[1], a[2], a[3], probability[0], probability[1]);
    }
    __syncwarp();
    load_item(slot);
    next_slot();
  }
  copy_async_wait<0>();

#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) {
      head_sum[j] += __shfl_xor_sync(~0u, head_sum[j], offset);
    }
    if (group == 0) stats[warp][quad * 2 + j] = {head_max[j], head_sum[j]};
  }
  __syncthreads();  // nobody needs the rings any more
  float* merge = reinterpret_cast<float*>(shared);  // [warp][head of the group][kMergeStride]
#pragma unroll
  for (int dd = 0; dd < D / 16; ++dd) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int head = quad * 2 + i % 2, column = dd * 16 + group + i / 2 * 8;
      if (head >= p.parts.group) continue;
      merge[(warp * kMaxGroup + head) * kMergeStride + column] = out[dd][i];
    }
  }
  __syncthreads();
  for (int piece = threadIdx.x; piece < p.parts.group * D / 4; piece += kThreads) {
    const int head = piece / (D / 4), column = piece % (D / 4) * 4;
    float maximum = -INFINITY, sum = 0.f;
    float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) maximum = fmaxf(maximum, stats[w][head].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 stat = stats[w][head];
      const float factor = stat.x == -INFINITY ? 0.f : exp2f(stat.x - maximum);
      const float4 part = *reinterpret_cast<const float4*>(
          merge + (w * kMaxGroup + head) * kMergeStride + column);
      sum += stat.y * factor;
      total = {total.x + part.x * factor, total.y + part.y * factor, total.z + part.z * factor,
               total.w + part.w * factor};
    }
    const int64_t row = blockIdx.x * p.parts.group + head;
    *reinterpret_cast<float4*>(p.parts.outs + row * D + column) = total;
    if (column == 0) p.parts.stats[row] = {maximum, sum};
  }
}

template <typename T>
void launch(const DecodeAttendParams& p, cudaStream_t stream) {
  allow_shared_memory(decode_attend_kernel<T>, kSharedBytes);
  launch_chained(decode_attend_kernel<T>, p.kv_heads * kMaxSplits, kThreads, kSharedBytes, stream,
                 p);
}

}  // namespace

void launch_decode_attend(const DecodeAttendParams& p, cudaStream_t stream) {
  p.dtype == DType::kFloat16 ? launch<__half>(p, stream) : launch<__nv_bfloat16>(p, stream);
}

}  // namespace torchtune_fused
