#include <algorithm>

#include "mlp/matrix_map.h"
#include "mlp/mlp.h"
#include "mlp/weight_gradient.cuh"

namespace torchtune_fused {
namespace {

template <typename T, int kColumns>
void launch(const WeightGradientParams& p, cudaStream_t stream) {
  WeightGradientMaps maps;
  WeightGradientShape shape = {
      .tokens = p.tokens, .outputs = p.outputs, .columns = (p.k + kColumns - 1) / kColumns};
  maps.x = matrix_map(p.x, p.tokens, p.k, kDepth / 2, p.dtype, p.x_stride);
  for (int i = 0, pairs = 0; i < p.outputs; ++i) {
    pairs += (p.n[i] + 2 * kRows - 1) / (2 * kRows);
    shape.pair_ends[i] = pairs;
    maps.grad[i] = matrix_map(p.grads[i], p.tokens, p.n[i], kDepth, p.dtype, p.grad_strides[i]);
    maps.out[i] = matrix_map(p.outs[i], p.n[i], p.k, 64, p.dtype);
  }
  launch_product(weight_gradient_kernel<T, kColumns>, kGradientSharedBytes, stream, maps, shape);
}

}  // namespace

void launch_weight_gradient_sm90(const WeightGradientParams& p, cudaStream_t stream) {
  const auto launch_as = [&](auto type) {
    using T = decltype(type);
    if (p.columns == 192) {
      launch<T, 192>(p, stream);
    } else {
      launch<T, 256>(p, stream);
    }
  };
  if (p.dtype == DType::kFloat16) {
    launch_as(__half{});
  } else {
    launch_as(__nv_bfloat16{});
  }
}

}  // namespace torchtune_fused
