#include "mlp/gated_linear.cuh"

#include "mlp/matrix_map.h"
#include "mlp/mlp.h"

namespace torchtune_fused {
namespace {

template <typename T>
void launch(const GatedLinearParams& p, cudaStream_t stream) {
  const GatedLinearMaps maps = {
      .x = matrix_map(p.x, p.rows, p.k, kRows, p.dtype),
      .gate_weight = matrix_map(p.gate_weight, p.n, p.k, kGatedWidth, p.dtype),
      .up_weight = matrix_map(p.up_weight, p.n, p.k, kGatedWidth, p.dtype),
      .low = matrix_map(p.low ? p.low : p.x, p.rows, p.low ? p.rank : p.k, kRows, p.dtype),
      .low_gate = matrix_map(p.low ? p.low_gate : p.gate_weight, p.n, p.low ? p.rank_gate : p.k,
                             kGatedWidth, p.dtype),
      .low_up = matrix_map(p.low ? p.low_up : p.up_weight, p.n,
                           p.low ? p.rank - p.rank_gate : p.k, kGatedWidth, p.dtype),
      .gate = matrix_map(p.gate ? p.gate : p.hidden, p.rows, p.n, 64, p.dtype),
      .up = matrix_map(p.up ? p.up : p.hidden, p.rows, p.n, 64, p.dtype),
  };
  launch_product(gated_linear_kernel<T>, kGatedSharedBytes, stream, maps,
                 {p.rows, p.n, p.k, p.rank, p.rank_gate, p.hidden, p.activation,
                  p.gate != nullptr});
}

}  // namespace

void launch_gated_linear_sm90(const GatedLinearParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kFloat16) {
    launch<__half>(p, stream);
  } else {
    launch<__nv_bfloat16>(p, stream);
  }
}

}  // namespace torchtune_fused
