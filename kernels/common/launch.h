// Kernel launches that overlap.
#pragma once

#include "common/cuda_utils.h"

namespace torchtune_fused {

// Whether launches run code that was compiled for 9.0, and not PTX of an older architecture.
inline bool runs_sm90_code() {
#ifdef TTF_HAS_SM90
  return device_properties().arch == 90;
#else
  return false;
#endif
}

// Launches a kernel that follows the rule of programmatic dependent launch (common/ptx.cuh).
// If it `overlaps`, it may start before the work ahead of it has ended.
template <typename... KernelArgs, typename... Args>
void launch_in_clusters(void (*kernel)(KernelArgs...), bool overlaps, int cluster, dim3 grid,
                        dim3 block, size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (overlaps) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  TTF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...));
}

// Launches a kernel that reads weights before it waits.
//
// While the stream is being captured on a 9.0 GPU, the graph gets a programmatic edge: the kernel
// may start, and read its weights, before the one ahead of it has ended. Elsewhere the launch is
// an ordinary one. Eager launches never overlap, because nothing says that the work queued just
// before did not write the weights; within one captured step nothing writes them, and the graph
// itself starts after all earlier work.
template <typename... KernelArgs, typename... Args>
void launch_chained_in_clusters(void (*kernel)(KernelArgs...), int cluster, dim3 grid, dim3 block,
                                size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (runs_sm90_code()) TTF_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  launch_in_clusters(kernel, status == cudaStreamCaptureStatusActive, cluster, grid, block,
                     shared_bytes, stream, static_cast<Args&&>(args)...);
}

// Without clusters.
template <typename... KernelArgs, typename... Args>
void launch_chained(void (*kernel)(KernelArgs...), dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, Args&&... args) {
  launch_chained_in_clusters(kernel, 1, grid, block, shared_bytes, stream,
                             static_cast<Args&&>(args)...);
}

// Launches a kernel that reads and writes nothing before it waits, as those of training do: it may
// always overlap, whatever is ahead.
template <typename... KernelArgs, typename... Args>
void launch_waiting(void (*kernel)(KernelArgs...), dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, Args&&... args) {
  launch_in_clusters(kernel, runs_sm90_code(), 1, grid, block, shared_bytes, stream,
                     static_cast<Args&&>(args)...);
}

// ---- Reading a cache ahead ----------------------------------------------------------------------
// A kernel that lets its dependents start only after its own wait tells them that all grids before
// it have completed. If it writes nothing of a cache but the new slots, the kernel that follows may
// read the old slots before it waits. Whether it does follow is known while a graph is captured.

struct CapturedNode {
  unsigned long long capture = 0;
  cudaGraphNode_t node = nullptr;
};

// The node that the next captured launch will follow; none if nothing is being captured, or if
// there are several.
inline CapturedNode node_ahead(cudaStream_t stream) {
  CapturedNode ahead;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaGraphNode_t* nodes = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t count = 0;
#if CUDART_VERSION >= 13000
  TTF_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &ahead.capture, nullptr, &nodes, &edges,
                                          &count));
#else
  TTF_CUDA_CHECK(cudaStreamGetCaptureInfo_v3(stream, &status, &ahead.capture, nullptr, &nodes,
                                             &edges, &count));
#endif
  if (status == cudaStreamCaptureStatusActive && count == 1) ahead.node = nodes[0];
  return ahead;
}

inline thread_local CapturedNode cache_reader_may_follow;

// To be called after the launch of such a kernel.
inline void let_cache_be_read_ahead(cudaStream_t stream) {
  if (runs_sm90_code()) cache_reader_may_follow = node_ahead(stream);
}

inline bool may_read_cache_ahead(cudaStream_t stream) {
  if (!runs_sm90_code()) return false;
  const CapturedNode ahead = node_ahead(stream), &noted = cache_reader_may_follow;
  return ahead.node != nullptr && ahead.node == noted.node && ahead.capture == noted.capture;
}

// Lets a kernel use so much dynamic shared memory, and asks for the largest share of L1 to be shared
// memory, as all kernels of a chain do: an SM must run empty before it can change the division, so
// kernels that differ in it never overlap.
template <typename Kernel>
void allow_shared_memory(Kernel* kernel, size_t bytes) {
  TTF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
  if (bytes > 48 * 1024) {
    TTF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
  }
}

}  // namespace torchtune_fused
