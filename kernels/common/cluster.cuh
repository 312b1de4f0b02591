// Clusters: blocks that run side by side and reach each other's shared memory. Before 9.0, and
// without the launch attribute, a block is a cluster of its own.
#pragma once

#include <cstdint>

namespace torchtune_fused {

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// Of this block in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Another block's shared memory may be used from when it runs until it ends. That it runs is all
// that this barrier says: nothing that was written before is visible behind it.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// What any thread of the cluster has written before is visible behind it.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// The same place in the shared memory of another block, to be loaded from and stored to.
template <typename T>
__device__ __forceinline__ T* in_block(T* pointer, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %0, %1;" : "+l"(pointer) : "r"(rank));
#endif
  return pointer;
}

// The same as a number, and 9.0 only, as what follows.
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

__device__ __forceinline__ void store_async(uint32_t shared, int v, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [%0], %1, [%2];" ::"r"(
                   shared),
               "r"(v), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_async(uint32_t shared, ulonglong2 v, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.u64 [%0], {%1, %2}, [%3];" ::"r"(
          shared),
      "l"(v.x), "l"(v.y), "r"(barrier)
      : "memory");
}

}  // namespace torchtune_fused
