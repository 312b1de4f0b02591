// The gradients of rotated heads with a norm. Without one, they are a rotation themselves.
//
// With the norm before the rotation R, y = R(n * w), n = x * rstd:
//   g = Rt(grad), grad_x = rstd * (g * w - n * mean(g * w * n)), grad_w = sum of g * n;
// with the norm after it, the same with R(x) for x and grad for g, and Rt of grad_x at the end.
// Layout as in rope.cuh, but one wave of blocks that stride over the tokens: each lane sums up the
// gradient of the weights it holds, each block writes one row of sums, in an order that is fixed.
#pragma once

#include "common/ptx.cuh"
#include "rope/pairs.cuh"

namespace torchtune_fused {

template <typename T, int kVec>
__global__ void __launch_bounds__(32 * kWarps, kVec == 8 ? 4 : 2)
    rope_backward_kernel(const __grid_constant__ RopeParams p) {
  wait_for_grid();
  using Acc = AccOf<T>;
  __shared__ Staged<Acc> staged;
  const bool keys = blockIdx.x >= p.of[0].blocks;
  const RopeHeads& heads = p.of[keys];
  const int block = blockIdx.x - (keys ? p.of[0].blocks : 0), warp = threadIdx.x / 32;
  const Slice<kVec> slice = slice_of<kVec>(p);
  const int at_once = 32 >> p.lane_bits, own = threadIdx.x % 32 >> p.lane_bits;
  const unsigned steps = p.steps, stride = heads.blocks * kWarps;

  // The round after the one worked on is under way, of this token or of the next.
  Packed<T, kVec> next_x, next_grad;
  const auto load = [&](unsigned token, int head) {
    next_x = next_grad = {};
    if (token >= p.tokens || head >= heads.heads) return;
    const unsigned batch = token / steps, step = token - batch * steps;
    const auto from = [&](const void* data, const int64_t (&stride)[3]) {
      return static_cast<const T*>(data) + batch * stride[0] + step * stride[1] + head * stride[2];
    };
    next_x = load_packed<T>(slice, from(heads.x, heads.stride));
    next_grad = load_packed<T>(slice, from(heads.grad, heads.grad_stride));
  };
  unsigned token = block * kWarps + warp;
  load(token, own);
  stage_norm(p, heads, staged);
  Pairs<Acc> grad_norm = {};

  for (; token < p.tokens; token += stride) {
    const unsigned batch = token / steps, step = token - batch * steps;
    stage_angles(p, position_of(p, batch, step), staged.cos[warp], staged.sin[warp]);
    T* out = static_cast<T*>(heads.out) + batch * heads.out_stride[0] + step * heads.out_stride[1];
#pragma unroll 1
    for (int first = 0; first < heads.heads; first += at_once) {
      Pairs<Acc> values = unpacked(next_x, slice.interleaved);
      Pairs<Acc> grad = unpacked(next_grad, slice.interleaved);
      const bool last = first + at_once >= heads.heads;
      load(last ? token + stride : token, own + (last ? 0 : first + at_once));

      // Read in every round, as weights are: kept in registers they would cost warps.
      const Pairs<Acc> angles = staged_pairs(slice, staged.cos[warp], staged.sin[warp]);
      const Acc rstd = reciprocal_rms(values, slice.lanes, p);
      if (p.norm_before_rope) {
        grad = rotated(grad, angles, Acc{-1});
      } else {
        values = rotated(values, angles);
      }
      const Pairs<Acc> weight = staged_pairs(slice, staged.norm_a, staged.norm_b);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        grad.a[j] *= rstd;
        grad.b[j] *= rstd;
        grad_norm.a[j] += grad.a[j] * values.a[j];
        grad_norm.b[j] += grad.b[j] * values.b[j];
        grad.a[j] *= weight.a[j];
        grad.b[j] *= weight.b[j];
      }
      const Acc mean = head_sum(dot(grad, values), slice.lanes) / static_cast<Acc>(p.head_dim);
      const Acc factor = -mean * rstd * rstd;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        grad.a[j] += values.a[j] * factor;
        grad.b[j] += values.b[j] * factor;
      }
      if (!p.norm_before_rope) grad = rotated(grad, angles, Acc{-1});
      const int head = first + own;
      if (head < heads.heads) {
        store_packed(slice, packed<T, kVec>(grad, slice.interleaved),
                     out + head * heads.out_stride[2]);
      }
    }
  }

  launch_dependents();  // the few blocks that add up the rows of `partial`
  // Every group of lanes holds sums for a whole head; they are added up in order.
  __shared__ Acc sums[32 * kWarps * 2 * kPairs];
  const int group = threadIdx.x >> p.lane_bits, groups = 32 * kWarps >> p.lane_bits;
  slice.each([&](int c, int i) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      Acc* sum = sums + group * p.head_dim + slice.pair(i, j);
      sum[0] = grad_norm.a[c * kVec + j];
      sum[slice.half] = grad_norm.b[c * kVec + j];
    }
  });
  __syncthreads();
  for (int i = threadIdx.x; i < p.head_dim; i += 32 * kWarps) {
    const int channel = p.interleaved ? i % slice.half * 2 + i / slice.half : i;
    Acc sum = 0;
    for (int g = 0; g < groups; ++g) sum += sums[g * p.head_dim + i];
    static_cast<Acc*>(heads.partial)[int64_t{block} * p.head_dim + channel] = sum;
  }
}

}  // namespace torchtune_fused
