// Elements whose type is known at run time only: weights and tables, which are read through caches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/cuda_utils.h"

namespace torchtune_fused {

template <typename Acc>
__device__ __forceinline__ Acc load_element(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(data)[index]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    case DType::kFloat32:
      return static_cast<const float*>(data)[index];
    default:
      return static_cast<Acc>(static_cast<const double*>(data)[index]);
  }
}

template <typename Acc>
__device__ __forceinline__ void store_element(void* data, int64_t index, DType dtype, Acc value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<__half*>(data)[index] = __half(static_cast<float>(value));
      return;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[index] = __nv_bfloat16(static_cast<float>(value));
      return;
    case DType::kFloat32:
      static_cast<float*>(data)[index] = static_cast<float>(value);
      return;
    default:
      static_cast<double*>(data)[index] = value;
  }
}

}  // namespace torchtune_fused
