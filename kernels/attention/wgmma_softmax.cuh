// Masks and the online softmax of scores in registers, in the layout of wgmma.cuh: a thread holds
// two rows, 8 apart, and of these the columns 8 j + 2 (lane % 4) + {0, 1}, at
// s[4 j + 2 row + {0, 1}].
#pragma once

#include "attention/flash_forward_sm90_shared.cuh"

namespace torchtune_fused {

// By an instruction with a relative error of 2^-11, that of a score in 16 bits.
template <int kCount>
__device__ __forceinline__ void cap_scores(float (&s)[kCount], float tanh_scale) {
#pragma unroll
  for (float& score : s) {
    asm("tanh.approx.f32 %0, %1;" : "=f"(score) : "f"(score * tanh_scale));
  }
}

// Hides what is not in the ranges of keys, counted from this thread's first column.
template <int kCount>
__device__ __forceinline__ void hide_outside(float (&s)[kCount], const KeyRange (&seen)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = s[4 * j + 2 * row + e];
        const int column = 8 * j + e;
        score = column >= seen[row].first && column < seen[row].last ? score : -INFINITY;
      }
    }
  }
}

// Hides of one row what has a bit of 0; `bits` are those of the tile's columns, `words` of them.
template <int kRow, int kCount>
__device__ __forceinline__ void hide_unset(float (&s)[kCount], const uint32_t* bits, int words) {
#pragma unroll
  for (int w = 0; w < kCount / 16; ++w) {
    const uint32_t word = (w < words ? bits[w] : 0u) >> (threadIdx.x % 4 * 2);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = s[16 * w + 4 * j + 2 * kRow + e];
        score = word >> (8 * j + e) & 1 ? score : -INFINITY;
      }
    }
  }
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The online softmax of a thread's two rows.
struct Softmax {
  float max[2] = {-INFINITY, -INFINITY};  // that probabilities are relative to
  float sum[2] = {0.f, 0.f};              // of this thread's columns

  // Turns scores into probabilities, and says whether what came before is to be multiplied by
  // `decay`. It seldom is: the maxima stay until some row of the warp has outgrown its own by
  // 2^8. Up to there probabilities are above 1, which changes no result and overflows nowhere.
  // kMasked: a row may have no score yet but -inf.
  template <bool kMasked, int kCount>
  __device__ __forceinline__ bool update(float (&s)[kCount], float scale, float (&decay)[2]) {
    constexpr float kSlack = 8.f;
    float shift[2], tops[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = max[row];
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        top = fmaxf(top, fmaxf(s[4 * j + 2 * row], s[4 * j + 2 * row + 1]));
      }
      tops[row] = quad_max(top);
    }
    // Not so for the first scores: inf or NaN is not below.
    const bool keep = __all_sync(~0u, (tops[0] - max[0]) * scale <= kSlack &&
                                          (tops[1] - max[1]) * scale <= kSlack);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float top = keep ? max[row] : tops[row];
      shift[row] = kMasked && top == -INFINITY ? 0.f : top * scale;
      decay[row] = exp2_approx(max[row] * scale - shift[row]);
      max[row] = top;
      sum[row] *= decay[row];
    }
    exponentials(s, scale, shift, sum);
    return !keep;
  }

  // The same without a look at the scores, for those that are not masked: the maxima stay. False if
  // they can't: some row of the warp has outgrown its own by far, or has none. The scores are then
  // lost, and nothing else has changed.
  template <int kCount>
  __device__ __forceinline__ bool update_boldly(float (&s)[kCount], float scale, float most) {
    const float shift[2] = {max[0] * scale, max[1] * scale};
    float sums[2] = {0.f, 0.f};
    exponentials(s, scale, shift, sums);
    const bool fits = __all_sync(~0u, sums[0] <= most && sums[1] <= most);
    if (fits) {
      sum[0] += sums[0];
      sum[1] += sums[1];
    }
    return fits;
  }

 private:
  template <int kCount>
  __device__ __forceinline__ void exponentials(float (&s)[kCount], float scale,
                                               const float (&shift)[2], float (&sums)[2]) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& a = s[4 * j + 2 * row];
        float& b = s[4 * j + 2 * row + 1];
        a = exp2_approx(fmaf(a, scale, -shift[row]));
        b = exp2_approx(fmaf(b, scale, -shift[row]));
        sums[row] += a + b;
      }
    }
  }
};

}  // namespace torchtune_fused
