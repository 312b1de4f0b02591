#include <algorithm>

#include "common/launch.h"
#include "common/types.cuh"
#include "norm/layout.cuh"
#include "norm/rms_norm.cuh"

namespace torchtune_fused {
namespace {

RowLayout layout_of(const RmsNormBackwardParams& p) {
  return row_layout(p.dim, p.dtype, {p.x, p.grad, p.grad_skip, p.grad_x, p.weight});
}

constexpr size_t ring_bytes(int block, int parts) {
  return sizeof(uint4) * kVectors * kStages * block * parts;
}
static_assert(ring_bytes(kMaxBlock, 3) <= 96 * 1024, "an 8.6 has no more than 99 KB for a block");

}  // namespace

int rms_norm_backward_blocks(const RmsNormBackwardParams& params) {
  const RowLayout layout = layout_of(params);
  const bool any = layout.threads_per_row == 0;
  int per_sm = 0;
  with_type(params.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (!std::is_same_v<T, double>) {
      if (!any) {
        allow_shared_memory(rms_norm_backward_kernel<T>, ring_bytes(kMaxBlock, 3));
        TTF_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &per_sm, rms_norm_backward_kernel<T>, layout.block,
            ring_bytes(layout.block, row_parts(params))));
        return;
      }
    }
    TTF_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_sm, rms_norm_backward_any_kernel<T>, kAnyBlock, 0));
  });
  const int64_t needed = any ? params.rows : layout.blocks(params.rows);
  return static_cast<int>(std::min(needed, int64_t{per_sm} * device_properties().num_sms));
}

void launch_rms_norm_backward(const RmsNormBackwardParams& params, int blocks,
                              cudaStream_t stream) {
  if (blocks == 0) return;  // an empty grid is an error
  const RowLayout layout = layout_of(params);
  with_type(params.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (!std::is_same_v<T, double>) {
      if (layout.threads_per_row > 0) {
        const size_t shared_bytes = ring_bytes(layout.block, row_parts(params));
        launch_waiting(rms_norm_backward_kernel<T>, blocks, layout.block, shared_bytes, stream,
                       params, layout.threads_per_row);
        return;
      }
    }
    launch_waiting(rms_norm_backward_any_kernel<T>, blocks, kAnyBlock, 0, stream, params);
  });
}

}  // namespace torchtune_fused
