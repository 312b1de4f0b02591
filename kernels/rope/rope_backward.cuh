// The gradients of rotated heads with a norm. Without one, they are a rotation themselves.
//
// With the norm before the rotation R, y = R(n * w), n = x * rstd:
//   g = Rt(grad), grad_x = rstd * (g * w - n * mean(g * w * n)), grad_w = sum of g * n;
// with the norm after it, the same with R(x) for x and grad for g, and Rt of grad_x at the end.
// Layout as in rope.cuh, but one wave of blocks that stride over the tokens: each lane sums up the
// gradient of the weights it holds, each block writes one row of sums, in an order that is fixed.
#pragma once

#include "rope/rope.cuh"

namespace torchtune_fused {

template <typename T, int kVec>
__global__ void __launch_bounds__(32 * kWarps, 2)
    rope_backward_kernel(const __grid_constant__ RopeParams p) {
  wait_for_grid();
  using Acc = AccOf<T>;
  __shared__ Staged<Acc> staged;
  const bool keys = blockIdx.x >= p.of[0].blocks;
  const RopeHeads& heads = p.of[keys];
  const int block = blockIdx.x - (keys ? p.of[0].blocks : 0), warp = threadIdx.x / 32;
  stage_norm(p, heads, staged.norm);
  const Slice<kVec> slice = slice_of<kVec>(p);
  const int at_once = 32 / slice.lanes;
  Pairs<Acc> grad_norm = {};

  for (int64_t token = int64_t{block} * kWarps + warp; token < p.tokens;
       token += int64_t{heads.blocks} * kWarps) {
    stage_angles(p, token, staged.cos[warp], staged.sin[warp]);
    const Pairs<Acc> angles = staged_angles(slice, staged.cos[warp], staged.sin[warp]);
    const T* x = static_cast<const T*>(heads.x) + offset_of(heads.stride, token, p.steps, 0);
    const T* grads =
        static_cast<const T*>(heads.grad) + offset_of(heads.grad_stride, token, p.steps, 0);
    T* out = static_cast<T*>(heads.out) + offset_of(heads.out_stride, token, p.steps, 0);
    for (int first = 0; first < heads.heads; first += at_once) {
      const int head = first + threadIdx.x % 32 / slice.lanes;
      const bool valid = head < heads.heads;
      Pairs<Acc> values = {}, grad = {};
      if (valid) {
        values = load_pairs<kVec, T, Acc>(slice, x + head * heads.stride[2]);
        grad = load_pairs<kVec, T, Acc>(slice, grads + head * heads.grad_stride[2]);
      }
      const Acc rstd = reciprocal_rms(values, slice.lanes, p);
      if (p.norm_before_rope) {
        grad = rotated(grad, angles, Acc{-1});
      } else {
        values = rotated(values, angles, Acc{1});
      }
      const Pairs<Acc> weight = load_pairs<kVec, Acc, Acc>(slice, staged.norm);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        values.a[j] *= rstd;
        values.b[j] *= rstd;
        grad_norm.a[j] += grad.a[j] * values.a[j];
        grad_norm.b[j] += grad.b[j] * values.b[j];
        grad.a[j] *= weight.a[j];
        grad.b[j] *= weight.b[j];
      }
      const Acc mean = head_sum(dot(grad, values), slice.lanes) / static_cast<Acc>(p.head_dim);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        grad.a[j] = rstd * (grad.a[j] - values.a[j] * mean);
        grad.b[j] = rstd * (grad.b[j] - values.b[j] * mean);
      }
      if (!p.norm_before_rope) grad = rotated(grad, angles, Acc{-1});
      if (valid) store_pairs(slice, grad, out + head * heads.out_stride[2]);
    }
  }

  // Every group of lanes holds sums for a whole head; they are added up in order.
  __shared__ alignas(16) Acc sums[32 * kWarps * 2 * kPairs];
  const int group = threadIdx.x / slice.lanes, groups = 32 * kWarps / slice.lanes;
  store_pairs(slice, grad_norm, sums + group * p.head_dim);
  __syncthreads();
  for (int i = threadIdx.x; i < p.head_dim; i += 32 * kWarps) {
    Acc sum = 0;
    for (int g = 0; g < groups; ++g) sum += sums[g * p.head_dim + i];
    static_cast<Acc*>(heads.partial)[int64_t{block} * p.head_dim + i] = sum;
  }
}

}  // namespace torchtune_fused
