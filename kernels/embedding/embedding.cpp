// The gradient of an embedding: checks on the tensors, and the launch.
#include "embedding/embedding.h"

#include <limits>

#include "common/torch_utils.h"

namespace torchtune_fused {

void embedding_add_(Tensor grad_weight, const Tensor& ids, const Tensor& order,
                    const Tensor& grad) {
  const DType dtype = floating_dtype(grad_weight, "grad_weight");
  check_shape(grad_weight, "grad_weight", {-1, -1});
  check_contiguous(grad_weight, "grad_weight");
  check_shape(ids, "ids", {-1});
  const int64_t tokens = ids.size(0), dim = grad_weight.size(1);
  TTF_CHECK(tokens <= std::numeric_limits<int>::max(), "ids must be at most 2^31 - 1, got ",
            tokens);
  const auto check_indices = [&](const Tensor& t, const char* name) {
    check_device(t, name, grad_weight);
    check_dtype(t, name, ScalarType::Long);
    check_shape(t, name, {tokens});
    check_contiguous(t, name);
  };
  check_indices(ids, "ids");
  check_indices(order, "order");
  check_like(grad, "grad", grad_weight, {tokens, dim});
  const LaunchContext context(grad_weight);
  launch_embedding_add({.grad_weight = grad_weight.mutable_data_ptr(),
                        .ids = static_cast<const int64_t*>(ids.const_data_ptr()),
                        .order = static_cast<const int64_t*>(order.const_data_ptr()),
                        .grad = grad.const_data_ptr(),
                        .tokens = tokens,
                        .dim = dim,
                        .dtype = dtype},
                       context.stream());
}

}  // namespace torchtune_fused
