#include "norm/rms_norm.cuh"

namespace torchtune_fused {

void launch_rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.rows == 0) return;
  const auto kernel = params.dtype == DType::kFloat16 ? rms_norm_kernel<__half>
                                                      : rms_norm_kernel<__nv_bfloat16>;
  kernel<<<static_cast<unsigned>(params.rows), kThreads, 0, stream>>>(params);
  TTF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace torchtune_fused
