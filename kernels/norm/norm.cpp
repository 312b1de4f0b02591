// RMSNorm: checks on the tensors, and the launch.
#include "norm/norm.h"

#include <tuple>
#include <vector>

#include "common/torch_utils.h"

namespace torchtune_fused {

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const DType dtype = floating_dtype(x, "x");
  const DType weight_dtype = floating_dtype(weight, "weight");
  TTF_CHECK(x.dim() >= 1, "x must have at least one dimension, got a scalar");
  const int64_t dim = x.size(x.dim() - 1);
  check_device(weight, "weight", x);
  check_shape(weight, "weight", {dim});

  const LaunchContext context(x);
  const Tensor dense_x = torch::stable::contiguous(x);
  const Tensor dense_weight = torch::stable::contiguous(weight);
  const std::vector<int64_t> rows(x.sizes().begin(), x.sizes().end() - 1);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  Tensor rstd = torch::stable::new_empty(
      x, rows, dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  launch_rms_norm({.x = dense_x.const_data_ptr(),
                   .weight = dense_weight.const_data_ptr(),
                   .y = y.mutable_data_ptr(),
                   .rstd = rstd.mutable_data_ptr(),
                   .rows = rstd.numel(),
                   .dim = dim,
                   .eps = eps,
                   .dtype = dtype,
                   .weight_dtype = weight_dtype},
                  context.stream());
  return {y, rstd};
}

}  // namespace torchtune_fused
