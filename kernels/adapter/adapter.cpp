// Low-rank adapters: checks on the tensors, and the launches.
#include "adapter/adapter.h"

#include <tuple>
#include <vector>

#include "common/torch_utils.h"

namespace torchtune_fused {

// Whether the kernel takes these, whose shapes fit, and is faster than two products for each.
bool adapter_gradients_takes(std::vector<Tensor> grads, std::vector<Tensor> bs, const Tensor& low) {
  const ScalarType dtype = low.scalar_type();
  bool takes = (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) &&
               grads.size() <= kMaxAdapters && low.is_contiguous() && starts_at_16_bytes(low) &&
               low.size(0) >= kMinAdapterRows;
  for (size_t i = 0; takes && i < grads.size(); ++i) {
    const Tensor &grad = grads[i], &b = bs[i];
    takes = grad.is_contiguous() && starts_at_16_bytes(grad) && grad.size(1) % 8 == 0 &&
            grad.size(1) > 0 && b.is_contiguous() && b.size(1) % 8 == 0 && b.size(1) > 0 &&
            b.size(1) <= kAdapterRank;
  }
  return takes;
}

std::tuple<Tensor, std::vector<Tensor>> adapter_gradients(std::vector<Tensor> grads,
                                                          std::vector<Tensor> bs, const Tensor& low,
                                                          double scale) {
  TTF_CHECK(adapter_gradients_takes(grads, bs, low),
            "adapter_gradients has no kernel for this case");
  const LaunchContext context(low);
  check_shape(low, "low", {-1, -1});
  const int64_t rows = low.size(0), ranks = low.size(1);
  Tensor grad_low = allocate(low, low.sizes());
  AdapterBackwardParams p = {.count = static_cast<int>(grads.size()),
                             .low = low.const_data_ptr(),
                             .grad_low = grad_low.mutable_data_ptr(),
                             .rows = static_cast<int>(rows),
                             .ranks = static_cast<int>(ranks),
                             .scale = static_cast<float>(scale),
                             .dtype = half_dtype(low, "low")};
  std::vector<Tensor> grad_bs;
  int64_t start = 0;
  for (int i = 0; i < p.count; ++i) {
    const Tensor &grad = grads[i], &b = bs[i];
    const int64_t n = b.size(0), rank = b.size(1);
    check_like(grad, "grads", low, {rows, n});
    check_like(b, "bs", low, {n, rank});
    grad_bs.push_back(allocate(b, b.sizes()));
    p.layers[i] = {.grad = grad.const_data_ptr(),
                   .b = b.const_data_ptr(),
                   .grad_b = grad_bs[i].mutable_data_ptr(),
                   .n = static_cast<int>(n),
                   .rank = static_cast<int>(rank),
                   .start = static_cast<int>(start)};
    start += rank;
  }
  TTF_CHECK(start == ranks, "low must have the ", start, " columns of all adapters, got ", ranks);
  const int64_t size = plan_adapter_backward(p);
  Tensor partial = allocate(low, {size}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  launch_adapter_backward(p, context.stream());
  return {grad_low, grad_bs};
}

}  // namespace torchtune_fused
