// Random numbers that are a function of a counter and a key alone.
#pragma once

#include <cstdint>

namespace torchtune_fused {

// Philox 4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * counter.x, b = 0xCD9E8D57ull * counter.z;
    counter = {static_cast<uint32_t>(b >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(a)};
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// Gumbel noise. What draws an unlikely token is its upper tail, which therefore comes from uniform
// numbers near 0, where floats are fine, and never from one that was rounded to 1: that would be
// infinite noise.
__device__ __forceinline__ float gumbel(uint32_t bits) {
  const float uniform = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
  return -logf(-log1pf(-fminf(uniform, 1 - 0x1p-24f)));
}

}  // namespace torchtune_fused
