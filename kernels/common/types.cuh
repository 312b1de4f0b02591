// Element types: from a DType to the C++ type it stands for, and what that is computed in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/cuda_utils.h"

namespace torchtune_fused {

template <typename T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a value of the C++ type that stands for `dtype`.
template <typename F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(__half{});
    case DType::kBFloat16:
      return f(__nv_bfloat16{});
    case DType::kFloat32:
      return f(float{});
    case DType::kFloat64:
      return f(double{});
  }
}

}  // namespace torchtune_fused
