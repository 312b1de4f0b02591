// Shared memory of the other blocks of a cluster. 9.0 only.
#pragma once

#include <cstdint>

namespace torchtune_fused {

// The same place in the shared memory of another block.
__device__ __forceinline__ uint32_t in_block(uint32_t shared, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// Stores to another block's shared memory; its barrier counts the bytes as they arrive.
__device__ __forceinline__ void store_async(uint32_t shared, float4 v, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
      ::"r"(shared), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void store_async(uint32_t shared, float2 v, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
      ::"r"(shared), "f"(v.x), "f"(v.y), "r"(barrier)
      : "memory");
}

}  // namespace torchtune_fused
