// A row's logits, four neighbours at a time, and their perturbed scores.
#pragma once

#include "sampling/noise.cuh"
#include "sampling/rank.cuh"
#include "sampling/sampling.h"

namespace torchtune_fused {

// The logits of four tokens; -inf after the last.
__device__ __forceinline__ void load_quad(const SampleParams& p, int row, int token,
                                          float (&logits)[4]) {
  const float* first = p.logits + static_cast<int64_t>(row) * p.vocab + token;
  if (p.aligned && token < p.vocab) {
    *reinterpret_cast<float4*>(logits) = *reinterpret_cast<const float4*>(first);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) logits[j] = token + j < p.vocab ? first[j] : -INFINITY;
  }
}

// What the state of the random numbers makes of a row's tokens.
struct RowNoise {
  uint64_t seed, offset;
  int row;

  __device__ RowNoise(const SampleParams& p, int row)
      : seed(p.rng_state[0]), offset(p.rng_state[1]), row(row) {}

  // A word for each of four tokens, of which `token` is the first.
  __device__ __forceinline__ uint4 of_quad(int token) const {
    return philox({static_cast<uint32_t>(token / 4), static_cast<uint32_t>(row),
                   static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)},
                  {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  }

  __device__ __forceinline__ uint32_t of_token(int token) const {
    const uint4 words = of_quad(token);
    const uint32_t even = token & 2 ? words.z : words.x, odd = token & 2 ? words.w : words.y;
    return token & 1 ? odd : even;
  }
};

// The rank of a token's perturbed score.
__device__ __forceinline__ uint64_t drawn_rank(const SampleParams& p, float logit, float largest,
                                               uint32_t bits, int token) {
  return rank_of((logit - largest) * p.inverse_temperature + gumbel(bits), token);
}

}  // namespace torchtune_fused
