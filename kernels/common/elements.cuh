// Elements whose type is known at run time only: weights and tables, which are read through caches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/cuda_utils.h"

namespace torchtune_fused {

// Several at once, so that none waits for another.
template <int kCount, typename Acc>
__device__ __forceinline__ void load_elements(const void* data, const int64_t (&index)[kCount],
                                              DType dtype, Acc (&out)[kCount]) {
  const auto load = [&](auto convert) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) out[n] = convert(index[n]);
  };
  switch (dtype) {
    case DType::kFloat16:
      return load([&](int64_t i) { return __half2float(static_cast<const __half*>(data)[i]); });
    case DType::kBFloat16:
      return load([&](int64_t i) {
        return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
      });
    case DType::kFloat32:
      return load([&](int64_t i) { return static_cast<const float*>(data)[i]; });
    default:
      return load([&](int64_t i) {
        return static_cast<Acc>(static_cast<const double*>(data)[i]);
      });
  }
}

template <typename Acc>
__device__ __forceinline__ Acc load_element(const void* data, int64_t index, DType dtype) {
  Acc out[1];
  load_elements(data, {index}, dtype, out);
  return out[0];
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
