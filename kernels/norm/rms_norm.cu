#include "common/launch.h"
#include "common/types.cuh"
#include "norm/layout.cuh"
#include "norm/rms_norm.cuh"

namespace torchtune_fused {

void launch_rms_norm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.rows == 0) return;  // an empty grid is an error
  const RowLayout layout =
      row_layout(params.dim, params.dtype,
                 {params.x, params.residual, params.y, params.sum, params.weight});
  with_type(params.dtype, [&](auto x) {
    using T = decltype(x);
    if constexpr (!std::is_same_v<T, double>) {
      if (layout.threads_per_row > 0) {
        const unsigned blocks = layout.blocks(params.rows);
        launch_waiting(rms_norm_kernel<T>, blocks, layout.block, 0, stream, params,
                       layout.threads_per_row);
        return;
      }
    }
    launch_waiting(rms_norm_any_kernel<T>, static_cast<unsigned>(params.rows), kAnyBlock, 0, stream,
                   params);
  });
}

}  // namespace torchtune_fused
