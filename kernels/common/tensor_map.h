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

// Whether it can describe a tensor [batch][heads][rows][columns] of 16-bit elements: rows at
// multiples of 16 bytes, and no stride of 0.
inline bool copyable(const void* data, const int64_t (&stride)[3], int batch, int heads,
                     int rows) {
  const auto fits = [](int size, int64_t elements) {
    return size <= 1 || (elements > 0 && elements % 8 == 0);
  };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(batch, stride[0]) &&
         fits(heads, stride[1]) && fits(rows, stride[2]);
}

}  // namespace torchtune_fused
