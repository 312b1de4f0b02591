// Rotary position embeddings of queries and keys, with an RMSNorm over each head or without.
//
// A pair (a, b) of channels becomes (a cos - b sin, b cos + a sin); norms are those of
// norm/rms_norm. Keys may go into a KV cache, and values with them, as they are. Grid: blocks for
// the queries, then for the keys, then for the values; in the other dimension, parts of a token's
// heads. Block: kWarps warps, each with the heads of one token, as many at once as fit its lanes
// (pairs.cuh). Memory answers late, so rounds of heads are under way ahead of the one worked on,
// the first ones before the angles are looked up.
#pragma once

#include "common/ptx.cuh"
#include "rope/pairs.cuh"

namespace torchtune_fused {

// Rounds of heads that are under way, and blocks that share an SM.
template <int kVec>
constexpr int kAhead = kVec == 8 ? 2 : 1;
template <int kVec>
constexpr int kBlocksPerSm = kVec == 8 ? 6 : 2;

template <typename T, int kVec>
__global__ void __launch_bounds__(32 * kWarps, kBlocksPerSm<kVec>)
    rope_kernel(const __grid_constant__ RopeParams p) {
  wait_for_grid();
  using Acc = AccOf<T>;
  __shared__ Staged<Acc> staged;
  int part = 0, block = blockIdx.x;
  for (; block >= p.of[part].blocks; ++part) block -= p.of[part].blocks;
  const RopeHeads& heads = p.of[part];
  const int warp = threadIdx.x / 32;
  const unsigned token = block * kWarps + warp;
  const unsigned batch = token / static_cast<unsigned>(p.steps), step = token - batch * p.steps;

  const Slice<kVec> slice = slice_of<kVec>(p);
  const int at_once = 32 >> p.lane_bits, own = threadIdx.x % 32 >> p.lane_bits;
  int first = blockIdx.y * p.heads_per_warp;
  const int end = token < p.tokens ? min(first + p.heads_per_warp, heads.heads) : 0;
  const T* x = static_cast<const T*>(heads.x) + batch * heads.stride[0] + step * heads.stride[1] +
               (first + own) * heads.stride[2];
  Packed<T, kVec> ahead[kAhead<kVec>];
  const auto load = [&](int head, Packed<T, kVec>& to) {
    to = {};
    if (head < end) to = load_packed<T>(slice, x);
    x += at_once * heads.stride[2];
  };
#pragma unroll
  for (int n = 0; n < kAhead<kVec>; ++n) load(first + n * at_once + own, ahead[n]);
  stage_norm(p, heads, staged);
  if (first >= end) return;
  const int64_t slot = heads.cached ? *p.cache_pos + step : step;
  if (heads.cached && slot >= p.cache_len) return;  // see advance_kernel
  T* out = static_cast<T*>(heads.out) + batch * heads.out_stride[0] + slot * heads.out_stride[1] +
           (first + own) * heads.out_stride[2];
  Pairs<Acc> angles = {};
  if (!heads.as_they_are) {
    stage_angles(p, position_of(p, batch, step), staged.cos[warp], staged.sin[warp]);
    angles = staged_pairs(slice, staged.cos[warp], staged.sin[warp]);
  }

  // Lanes without a head take part in the sums of the others' norms.
#pragma unroll 1
  for (; first < end; first += at_once) {
    Packed<T, kVec> now = ahead[0];
#pragma unroll
    for (int n = 1; n < kAhead<kVec>; ++n) ahead[n - 1] = ahead[n];
    load(first + kAhead<kVec> * at_once + own, ahead[kAhead<kVec> - 1]);
    if (!heads.as_they_are) {
      Pairs<Acc> values = unpacked(now, slice.interleaved);
      if (heads.norm == nullptr) {
        values = rotated(values, angles);
      } else {
        const Acc rstd = reciprocal_rms(values, slice.lanes, p);  // turning keeps the norm
        const Pairs<Acc> weight = staged_pairs(slice, staged.norm_a, staged.norm_b);
        if (!p.norm_before_rope) values = rotated(values, angles);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          values.a[j] *= rstd * weight.a[j];
          values.b[j] *= rstd * weight.b[j];
        }
        if (p.norm_before_rope) values = rotated(values, angles);
      }
      now = packed<T, kVec>(values, slice.interleaved);
    }
    if (first + own < end) store_packed(slice, now, out);
    out += at_once * heads.out_stride[2];
  }
}

}  // namespace torchtune_fused
