// The gated MLP: checks on the tensors, and the launches.
#include "mlp/mlp.h"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/launch.h"
#include "common/torch_utils.h"

namespace torchtune_fused {
namespace {

void check_same(const Tensor& t, const char* name, const Tensor& gate) {
  check_device(t, name, gate);
  check_dtype(t, name, gate.scalar_type());
  check_contiguous(t, name);
  TTF_CHECK(t.sizes().equals(gate.sizes()), name, " must have the shape of gate, ",
            shape_string(gate), ", got ", shape_string(t));
}

bool rows_start_at_16_bytes(const Tensor& t) {
  return t.is_contiguous() && t.size(t.dim() - 1) % 8 == 0 && starts_at_16_bytes(t);
}

// Below, most of the GPU would be idle: a cluster takes 256 rows at a time.
constexpr int64_t kMinRowsOfGatedLinear = 512;

}  // namespace

Tensor gated_activation(const Tensor& gate, const Tensor& up, std::string activation) {
  const DType dtype = floating_dtype(gate, "gate");
  check_contiguous(gate, "gate");
  check_same(up, "up", gate);
  const LaunchContext context(gate);
  Tensor hidden = allocate(gate, gate.sizes());
  launch_gated_activation({.gate = gate.const_data_ptr(),
                           .up = up.const_data_ptr(),
                           .hidden = hidden.mutable_data_ptr(),
                           .size = gate.numel(),
                           .activation = activation_of(activation),
                           .dtype = dtype},
                          context.stream());
  return hidden;
}

bool gated_linear_takes(const Tensor& x, const Tensor& w_gate, const Tensor& w_up,
                        std::vector<Tensor> low) {
  const LaunchContext context(x);
  const ScalarType dtype = x.scalar_type();
  return runs_sm90_code() && (dtype == ScalarType::Half || dtype == ScalarType::BFloat16) &&
         x.numel() > 0 && x.numel() >= kMinRowsOfGatedLinear * x.size(x.dim() - 1) &&
         w_gate.size(0) > 0 && w_gate.size(0) % 8 == 0 && rows_start_at_16_bytes(x) &&
         rows_start_at_16_bytes(w_gate) && rows_start_at_16_bytes(w_up) &&
         std::all_of(low.begin(), low.end(), rows_start_at_16_bytes);
}

std::tuple<Tensor, Tensor, Tensor> gated_linear(const Tensor& x, const Tensor& w_gate,
                                                const Tensor& w_up,
                                                const std::optional<Tensor>& low,
                                                const std::optional<Tensor>& b_gate,
                                                const std::optional<Tensor>& b_up,
                                                std::string activation, bool save) {
#ifdef TTF_HAS_SM90
  const LaunchContext context(x);
  std::vector<Tensor> adapters;
  if (low) {
    TTF_CHECK(b_gate && b_up, "low must come with b_gate and b_up");
    adapters = {*low, *b_gate, *b_up};
  }
  TTF_CHECK(gated_linear_takes(x, w_gate, w_up, adapters),
            "gated_linear has no kernel for this case");
  const int64_t n = w_gate.size(0), k = x.size(x.dim() - 1), rows = x.numel() / k;
  check_like(w_gate, "w_gate", x, {n, k});
  check_like(w_up, "w_up", x, {n, k});
  GatedLinearParams p = {.x = x.const_data_ptr(),
                         .gate_weight = w_gate.const_data_ptr(),
                         .up_weight = w_up.const_data_ptr(),
                         .rows = static_cast<int>(rows),
                         .n = static_cast<int>(n),
                         .k = static_cast<int>(k),
                         .activation = activation_of(activation),
                         .dtype = half_dtype(x, "x")};
  if (low) {
    const int64_t rank = low->size(low->dim() - 1), rank_gate = b_gate->size(1);
    TTF_CHECK(low->numel() == rows * rank, "low must have the ", rows, " rows of x, got ",
              shape_string(*low));
    check_like(*b_gate, "b_gate", x, {n, rank_gate});
    check_like(*b_up, "b_up", x, {n, rank - rank_gate});
    p.low = low->const_data_ptr();
    p.low_gate = b_gate->const_data_ptr();
    p.low_up = b_up->const_data_ptr();
    p.rank = static_cast<int>(rank);
    p.rank_gate = static_cast<int>(rank_gate);
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  const std::vector<int64_t> saved = save ? shape : std::vector<int64_t>{0};
  Tensor hidden = allocate(x, shape);
  Tensor gate = allocate(x, saved), up = allocate(x, saved);
  p.hidden = hidden.mutable_data_ptr();
  p.gate = save ? gate.mutable_data_ptr() : nullptr;
  p.up = save ? up.mutable_data_ptr() : nullptr;
  launch_gated_linear_sm90(p, context.stream());
  return {hidden, gate, up};
#else
  raise("gated_linear has no kernel in this build, which is not for 9.0a");
#endif
}

std::tuple<Tensor, Tensor, Tensor> gated_linear_backward(const Tensor& grad, const Tensor& w_down,
                                                         const Tensor& gate, const Tensor& up,
                                                         const std::optional<Tensor>& grad_low,
                                                         const std::optional<Tensor>& a_down,
                                                         std::string activation, bool need_hidden) {
#ifdef TTF_HAS_SM90
  const LaunchContext context(gate);
  std::vector<Tensor> adapter;
  if (grad_low) {
    TTF_CHECK(a_down, "grad_low must come with a_down");
    adapter = {*grad_low, *a_down};
  }
  TTF_CHECK(gated_linear_takes(gate, w_down, grad, adapter),
            "gated_linear_backward has no kernel for this case");
  check_shape(gate, "gate", {-1, -1});
  const int64_t rows = gate.size(0), n = gate.size(1), k = w_down.size(0);
  check_same(up, "up", gate);
  check_aligned(up, "up");
  check_like(grad, "grad", gate, {rows, k});
  check_like(w_down, "w_down", gate, {k, n});
  GatedLinearBackwardParams p = {.grad = grad.const_data_ptr(),
                                 .down = w_down.const_data_ptr(),
                                 .gate = gate.const_data_ptr(),
                                 .up = up.const_data_ptr(),
                                 .rows = static_cast<int>(rows),
                                 .n = static_cast<int>(n),
                                 .k = static_cast<int>(k),
                                 .activation = activation_of(activation),
                                 .dtype = half_dtype(gate, "gate")};
  if (grad_low) {
    const int64_t rank = a_down->size(0);
    check_like(*grad_low, "grad_low", gate, {rows, rank});
    check_like(*a_down, "a_down", gate, {rank, n});
    p.grad_low = grad_low->const_data_ptr();
    p.low_down = a_down->const_data_ptr();
    p.rank = static_cast<int>(rank);
  }
  Tensor hidden = need_hidden ? allocate(gate, gate.sizes()) : allocate(gate, {0});
  Tensor grad_gate = allocate(gate, gate.sizes()), grad_up = allocate(gate, gate.sizes());
  p.hidden = need_hidden ? hidden.mutable_data_ptr() : nullptr;
  p.grad_gate = grad_gate.mutable_data_ptr();
  p.grad_up = grad_up.mutable_data_ptr();
  launch_gated_linear_backward_sm90(p, context.stream());
  return {hidden, grad_gate, grad_up};
#else
  raise("gated_linear_backward has no kernel in this build, which is not for 9.0a");
#endif
}

std::tuple<Tensor, Tensor> gated_activation_backward(Tensor grad, const Tensor& gate,
                                                     const Tensor& up, std::string activation,
                                                     bool need_hidden) {
  const DType dtype = floating_dtype(gate, "gate");
  check_contiguous(gate, "gate");
  check_same(up, "up", gate);
  check_same(grad, "grad", gate);
  const LaunchContext context(gate);
  Tensor grad_gate = allocate(gate, gate.sizes());
  Tensor hidden = need_hidden ? allocate(gate, gate.sizes()) : allocate(gate, {0});
  launch_gated_activation_backward({.grad = grad.const_data_ptr(),
                                    .gate = gate.const_data_ptr(),
                                    .up = up.const_data_ptr(),
                                    .hidden = need_hidden ? hidden.mutable_data_ptr() : nullptr,
                                    .grad_gate = grad_gate.mutable_data_ptr(),
                                    .grad_up = grad.mutable_data_ptr(),
                                    .size = gate.numel(),
                                    .activation = activation_of(activation),
                                    .dtype = dtype},
                                   context.stream());
  return {hidden, grad_gate};
}

}  // namespace torchtune_fused
