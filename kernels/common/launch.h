// Kernel launches that overlap inside a CUDA graph.
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
//
// While the stream is being captured on a 9.0 GPU, the graph gets a programmatic edge: the kernel
// may start, and read its weights, before the one ahead of it has ended. Elsewhere the launch is
// an ordinary one. Eager launches never overlap, because nothing says that the work queued just
// before did not write the weights; within one captured step nothing writes them, and the graph
// itself starts after all earlier work.
template <typename... KernelArgs, typename... Args>
void launch_chained(void (*kernel)(KernelArgs...), dim3 grid, dim3 block, size_t shared_bytes,
                    cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  if (runs_sm90_code()) {
    cudaStreamCaptureStatus status;
    TTF_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    config.numAttrs = status == cudaStreamCaptureStatusActive ? 1 : 0;
  }
  TTF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...));
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
