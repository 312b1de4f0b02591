#include <algorithm>

#include "common/types.cuh"
#include "norm/layout.cuh"
#include "norm/rms_norm.cuh"

namespace torchtune_fused {
namespace {

RowLayout layout_of(const RmsNormBackwardParams& p) {
  return row_layout(p.dim, p.dtype, {p.x, p.grad, p.grad_x, p.weight});
}

}  // namespace

int rms_norm_backward_blocks(const RmsNormBackwardParams& params) {
  const RowLayout layout = layout_of(params);
  const int64_t needed = layout.threads_per_row > 0 ? layout.blocks(params.rows) : params.rows;
  int per_sm = 0;
  with_type(params.dtype, [&](auto x) {
    using T = decltype(x);
    const void* kernel = reinterpret_cast<const void*>(&rms_norm_backward_any_kernel<T>);
    if constexpr (!std::is_same_v<T, double>) {
      if (layout.threads_per_row > 0) {
        kernel = reinterpret_cast<const void*>(&rms_norm_backward_kernel<T>);
      }
    }
    TTF_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, layout.block, 0));
  });
  const int64_t wave = int64_t{per_sm} * device_properties().num_sms;
  return static_cast<int>(std::min(needed, wave));
}

void launch_rms_norm_backward(const RmsNormBackwardParams& params, int blocks,
                              cudaStream_t stream) {
  if (blocks == 0) return;  // an empty grid is an error
  const RowLayout layout = layout_of(params);
  with_type(params.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (!std::is_same_v<T, double>) {
      if (layout.threads_per_row > 0) {
        rms_norm_backward_kernel<T>
            <<<blocks, layout.block, 0, stream>>>(params, layout.threads_per_row);
        return;
      }
    }
    rms_norm_backward_any_kernel<T><<<blocks, kAnyBlock, 0, stream>>>(params);
  });
  TTF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace torchtune_fused
