// Which instantiation takes the heads at hand.
#pragma once

#include <cstdint>

#include "common/types.cuh"
#include "common/vec.cuh"
#include "rope/rope.h"

namespace torchtune_fused {

// Whether all heads can be read and written as 16-byte vectors of `size` elements.
inline bool made_of_vectors(const RopeParams& p, int size) {
  if (p.head_dim / 2 % size != 0) return false;
  for (const RopeHeads& heads : p.of) {
    if (heads.heads == 0) continue;
    for (const void* pointer : {heads.x, heads.grad, static_cast<const void*>(heads.out)}) {
      if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
    }
    for (int i = 0; i < 3; ++i) {
      for (const int64_t stride : {heads.stride[i], heads.grad_stride[i], heads.out_stride[i]}) {
        if (stride % size != 0) return false;
      }
    }
  }
  return true;
}

// Calls f(element, vector size), the size as a constant.
template <typename F>
void with_layout(const RopeParams& p, F f) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, double>) {
      constexpr int kSize = kVecSize<T>;
      if (made_of_vectors(p, kSize)) return f(type, std::integral_constant<int, kSize>{});
    }
    f(type, std::integral_constant<int, 1>{});
  });
}

// The lanes that a head of pairs of `size` channels at a time takes, as a power of two.
inline int lane_bits_of(const RopeParams& p, int size) {
  int bits = 0;
  while (bits < 5 && size << bits < p.head_dim / 2) ++bits;
  return bits;
}

}  // namespace torchtune_fused
