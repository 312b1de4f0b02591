// RMSNorm, alone or of a sum: checks on the tensors, and the launches.
#include "norm/norm.h"

#include <optional>
#include <tuple>
#include <vector>

#include "common/column_sum.h"
#include "common/torch_utils.h"

namespace torchtune_fused {

namespace {

// The length of a row, once x and weight are known to fit.
int64_t checked_dim(const Tensor& x, const Tensor& weight) {
  TTF_CHECK(x.dim() >= 1, "x must have at least one dimension, got a scalar");
  const int64_t dim = x.size(x.dim() - 1);
  check_device(weight, "weight", x);
  check_shape(weight, "weight", {dim});
  return dim;
}

// A tensor that goes with x, row by row.
void check_as_x(const Tensor& t, const char* name, const Tensor& x) {
  check_device(t, name, x);
  check_dtype(t, name, x.scalar_type());
  TTF_CHECK(t.sizes() == x.sizes(), name, " must have shape ", shape_string(x), " as x, got ",
            shape_string(t));
}

// y, x + residual (empty without residual) and the reciprocals of the root mean squares.
std::tuple<Tensor, Tensor, Tensor> normalise(const Tensor& x, const std::optional<Tensor>& residual,
                                             const Tensor& weight, double eps, bool unit_offset) {
  const DType dtype = floating_dtype(x, "x");
  const DType weight_dtype = floating_dtype(weight, "weight");
  const int64_t dim = checked_dim(x, weight);
  if (residual) check_as_x(*residual, "residual", x);

  const LaunchContext context(x);
  const Tensor dense_x = dense(x);
  const Tensor dense_residual = dense(residual.value_or(x));
  const Tensor dense_weight = dense(weight);
  const std::vector<int64_t> rows(x.sizes().begin(), x.sizes().end() - 1);
  Tensor y = allocate(x, x.sizes());
  Tensor sum = residual ? allocate(x, x.sizes()) : allocate(x, {0});
  Tensor rstd = allocate(x, rows, accumulator_of(dtype));
  launch_rms_norm({.x = dense_x.const_data_ptr(),
                   .residual = residual ? dense_residual.const_data_ptr() : nullptr,
                   .weight = dense_weight.const_data_ptr(),
                   .y = y.mutable_data_ptr(),
                   .sum = residual ? sum.mutable_data_ptr() : nullptr,
                   .rstd = rstd.mutable_data_ptr(),
                   .rows = rstd.numel(),
                   .dim = dim,
                   .eps = eps,
                   .weight_offset = unit_offset ? 1.0 : 0.0,
                   .dtype = dtype,
                   .weight_dtype = weight_dtype},
                  context.stream());
  return {y, sum, rstd};
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    bool unit_offset) {
  const auto [y, sum, rstd] = normalise(x, std::nullopt, weight, eps, unit_offset);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                                const Tensor& weight, double eps,
                                                bool unit_offset) {
  return normalise(x, residual, weight, eps, unit_offset);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, const Tensor& rstd,
                                             const std::optional<Tensor>& grad_skip,
                                             bool unit_offset, bool need_weight) {
  const DType dtype = floating_dtype(x, "x");
  const DType weight_dtype = floating_dtype(weight, "weight");
  const int64_t dim = checked_dim(x, weight);
  check_as_x(grad, "grad", x);
  if (grad_skip) check_as_x(*grad_skip, "grad_skip", x);
  check_device(rstd, "rstd", x);
  check_dtype(rstd, "rstd", accumulator_of(dtype));
  check_contiguous(rstd, "rstd");
  TTF_CHECK(rstd.numel() * dim == x.numel(), "rstd must have a number for each row of x, ",
            shape_string(x), ", got ", shape_string(rstd));

  const LaunchContext context(x);
  const Tensor dense_grad = dense(grad);
  const Tensor dense_skip = dense(grad_skip.value_or(grad));
  const Tensor dense_x = dense(x);
  const Tensor dense_weight = dense(weight);
  Tensor grad_x = allocate(x, x.sizes());
  RmsNormBackwardParams params = {.grad = dense_grad.const_data_ptr(),
                                  .x = dense_x.const_data_ptr(),
                                  .weight = dense_weight.const_data_ptr(),
                                  .rstd = rstd.const_data_ptr(),
                                  .grad_skip = grad_skip ? dense_skip.const_data_ptr() : nullptr,
                                  .grad_x = grad_x.mutable_data_ptr(),
                                  .partial = nullptr,
                                  .rows = rstd.numel(),
                                  .dim = dim,
                                  .weight_offset = unit_offset ? 1.0 : 0.0,
                                  .dtype = dtype,
                                  .weight_dtype = weight_dtype};
  const int blocks = rms_norm_backward_blocks(params);
  if (!need_weight) {
    launch_rms_norm_backward(params, blocks, context.stream());
    return {grad_x, allocate(weight, {0})};
  }
  Tensor partial = allocate(rstd, {blocks, dim});
  params.partial = partial.mutable_data_ptr();
  launch_rms_norm_backward(params, blocks, context.stream());
  Tensor grad_weight = allocate(weight, weight.sizes());
  launch_column_sum({.partial = params.partial,
                     .out = grad_weight.mutable_data_ptr(),
                     .rows = blocks,
                     .columns = dim,
                     .dtype = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32,
                     .out_dtype = weight_dtype},
                    context.stream());
  return {grad_x, grad_weight};
}

}  // namespace torchtune_fused
