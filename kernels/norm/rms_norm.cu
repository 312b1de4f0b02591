#include "norm/rms_norm.cuh"

namespace torchtune_fused {
namespace {

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

}  // namespace

void launch_rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.rows == 0) return;  // an empty grid is an error
  const unsigned blocks = static_cast<unsigned>(params.rows);
  with_type(params.dtype, [&](auto x) {
    with_type(params.weight_dtype, [&](auto weight) {
      rms_norm_kernel<decltype(x), decltype(weight)><<<blocks, kThreads, 0, stream>>>(params);
    });
  });
  TTF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace torchtune_fused
