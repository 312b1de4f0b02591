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

// Boxes of a tensor; strides in bytes.
template <int kRank>
CUtensorMap tensor_map(CUtensorMapDataType type, const void* data, const cuuint64_t (&sizes)[kRank],
                       const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank],
                       CUtensorMapSwizzle swizzle) {
  cuuint32_t steps[kRank];
  for (cuuint32_t& step : steps) step = 1;
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, type, kRank, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TTF_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled returned error ", result,
            " for a tensor of ", kRank, " dimensions with rows at every ", strides[0], " bytes");
  return map;
}

// The same of 16-bit elements, swizzled.
template <int kRank>
CUtensorMap swizzled_map(const void* data, const cuuint64_t (&sizes)[kRank],
                         const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank],
                         DType dtype) {
  const bool half = dtype == DType::kFloat16;
  return tensor_map<kRank>(
      half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, data, sizes,
      strides, box, CU_TENSOR_MAP_SWIZZLE_128B);
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
