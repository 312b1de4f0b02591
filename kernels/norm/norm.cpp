// RMSNorm: checks on the tensors, and the launch.
#include "norm/norm.h"

#include "common/torch_utils.h"

namespace torchtune_fused {

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const DType dtype = half_dtype(x, "x");
  TTF_CHECK(x.dim() >= 1, "x must have at least one dimension, got a scalar");
  const int64_t dim = x.size(x.dim() - 1);
  check_contiguous(x, "x");
  check_device(weight, "weight", x);
  check_dtype(weight, "weight", x.scalar_type());
  check_shape(weight, "weight", {dim});
  check_contiguous(weight, "weight");

  Tensor out = torch::stable::empty_like(x);
  const LaunchContext context(x);
  launch_rms_norm({.x = x.const_data_ptr(),
                   .weight = weight.const_data_ptr(),
                   .out = out.mutable_data_ptr(),
                   .rows = dim ? x.numel() / dim : 0,
                   .dim = dim,
                   .eps = static_cast<float>(eps),
                   .dtype = dtype},
                  context.stream());
  return out;
}

}  // namespace torchtune_fused
