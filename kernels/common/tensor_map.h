// The driver's function that describes a tensor to Hopper's copy engine (TMA).
#pragma once

#include <cuda.h>  // types only: nothing links libcuda

#include "common/cuda_utils.h"

namespace torchtune_fused {

// By way of the runtime, so that the library needs no libcuda to be linked.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    TTF_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
    TTF_CHECK(found == cudaDriverEntryPointSuccess,
              "the driver has no cuTensorMapEncodeTiled: update it to one for CUDA 12 or newer");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

}  // namespace torchtune_fused
