#include "mlp/gated_linear_backward.cuh"

#include "mlp/matrix_map.h"
#include "mlp/mlp.h"

namespace torchtune_fused {
namespace {

template <typename T>
void launch(const GatedLinearBackwardParams& p, cudaStream_t stream) {
  const bool low = p.grad_low != nullptr;
  const int64_t grad_bytes = 2 * int64_t{p.rows} * p.k, l2_bytes = device_properties().l2_bytes;
  const GatedLinearBackwardMaps maps = {
      .grad = matrix_map(p.grad, p.rows, p.k, kRows, p.dtype),
      .grad_low = matrix_map(low ? p.grad_low : p.grad, p.rows, low ? p.rank : p.k, kRows, p.dtype),
      .down = matrix_map(p.down, p.k, p.n, 64, p.dtype),
      .low_down = matrix_map(low ? p.low_down : p.down, low ? p.rank : p.k, p.n, 64, p.dtype),
  };
  launch_product(gated_linear_backward_kernel<T>, kBackwardSharedBytes, stream, maps,
                 {.rows = p.rows,
                  .n = p.n,
                  .k = p.k,
                  .rank = low ? p.rank : 0,
                  .keep_grad = 3 * grad_bytes <= 2 * l2_bytes,
                  .gate = p.gate,
                  .up = p.up,
                  .hidden = p.hidden,
                  .grad_gate = p.grad_gate,
                  .grad_up = p.grad_up,
                  .activation = p.activation});
}

}  // namespace

void launch_gated_linear_backward_sm90(const GatedLinearBackwardParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kFloat16) {
    launch<__half>(p, stream);
  } else {
    launch<__nv_bfloat16>(p, stream);
  }
}

}  // namespace torchtune_fused
