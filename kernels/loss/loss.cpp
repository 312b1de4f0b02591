// Cross-entropy: checks on the tensors, and the launches.
#include "loss/loss.h"

#include <limits>
#include <optional>

#include "common/torch_utils.h"

namespace torchtune_fused {

Tensor cross_entropy_(Tensor logits, const Tensor& targets, const std::optional<Tensor>& grad,
                      int64_t ignore_index, double softcap, double z_loss, bool backward) {
  const DType dtype = floating_dtype(logits, "logits");
  check_shape(logits, "logits", {-1, -1});
  const int64_t rows = logits.size(0), vocab = logits.size(1), stride = logits.stride(0);
  TTF_CHECK(vocab > 0 && vocab < std::numeric_limits<int>::max() &&
                rows < std::numeric_limits<int>::max(),
            "logits must have 1 to 2^31 - 2 columns and at most 2^31 - 2 rows, got ",
            shape_string(logits));
  TTF_CHECK(logits.stride(1) == 1 && (rows < 2 || stride * logits.element_size() % 16 == 0),
            "logits must have dense rows that start at multiples of 16 bytes, got strides [",
            stride, ", ", logits.stride(1), "]");
  check_aligned(logits, "logits");
  check_device(targets, "targets", logits);
  check_dtype(targets, "targets", ScalarType::Long);
  check_shape(targets, "targets", {rows});
  check_contiguous(targets, "targets");
  if (grad) {
    check_device(*grad, "grad", logits);
    check_dtype(*grad, "grad", accumulator_of(dtype));
    check_shape(*grad, "grad", {rows});
    check_contiguous(*grad, "grad");
  }

  const LaunchContext context(logits);
  Tensor losses = allocate(logits, {rows}, accumulator_of(dtype));
  launch_cross_entropy({.logits = logits.mutable_data_ptr(),
                        .targets = static_cast<const int64_t*>(targets.const_data_ptr()),
                        .grad = grad ? grad->const_data_ptr() : nullptr,
                        .losses = losses.mutable_data_ptr(),
                        .rows = rows,
                        .stride = stride,
                        .vocab = vocab,
                        .ignore_index = ignore_index,
                        .softcap = softcap,
                        .z_loss = z_loss,
                        .backward = backward,
                        .dtype = dtype},
                       context.stream());
  return losses;
}

void scale_(Tensor x, const Tensor& factor) {
  const DType dtype = floating_dtype(x, "x");
  check_contiguous(x, "x");
  check_aligned(x, "x");
  check_device(factor, "factor", x);
  check_dtype(factor, "factor", accumulator_of(dtype));
  TTF_CHECK(factor.numel() == 1, "factor must have one element, got ", shape_string(factor));
  const LaunchContext context(x);
  launch_scale({.x = x.mutable_data_ptr(),
                .factor = factor.const_data_ptr(),
                .n = x.numel(),
                .dtype = dtype},
               context.stream());
}

}  // namespace torchtune_fused
