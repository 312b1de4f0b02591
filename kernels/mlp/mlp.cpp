// The gated MLP: checks on the tensors, and the launches.
#include "mlp/mlp.h"

#include <optional>
#include <string>
#include <tuple>
#include <utility>
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

using Outputs = std::tuple<Tensor, Tensor, Tensor>;

#ifdef TTF_HAS_SM90
// One product with the activation in its epilogue; nothing where the kernel doesn't take the case.
std::optional<Outputs> gated_linear_sm90(const Tensor& x, const Tensor& w_gate, const Tensor& w_up,
                                         Activation activation, bool save) {
  const DType dtype = floating_dtype(x, "x");
  if (!runs_sm90_code() || !x.is_contiguous() || !w_gate.is_contiguous() ||
      !w_up.is_contiguous() || (dtype != DType::kFloat16 && dtype != DType::kBFloat16)) {
    return {};
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = w_gate.size(0);
  GatedLinearParams p = {.x = x.const_data_ptr(),
                         .gate_weight = w_gate.const_data_ptr(),
                         .up_weight = w_up.const_data_ptr(),
                         .rows = static_cast<int>(x.numel() / x.size(x.dim() - 1)),
                         .n = static_cast<int>(w_gate.size(0)),
                         .k = static_cast<int>(w_gate.size(1)),
                         .activation = activation,
                         .dtype = dtype};
  if (!gated_linear_sm90_takes(p)) return {};
  const LaunchContext context(x);
  Tensor hidden = torch::stable::new_empty(x, shape);
  Tensor gate = torch::stable::new_empty(x, save ? shape : std::vector<int64_t>{0});
  Tensor up = torch::stable::new_empty(x, save ? shape : std::vector<int64_t>{0});
  p.hidden = hidden.mutable_data_ptr();
  p.gate = save ? gate.mutable_data_ptr() : nullptr;
  p.up = save ? up.mutable_data_ptr() : nullptr;
  launch_gated_linear_sm90(p, context.stream());
  return Outputs{hidden, gate, up};
}
#endif

}  // namespace

Tensor gated_activation(const Tensor& gate, const Tensor& up, std::string activation) {
  const DType dtype = floating_dtype(gate, "gate");
  check_contiguous(gate, "gate");
  check_same(up, "up", gate);
  const LaunchContext context(gate);
  Tensor hidden = torch::stable::empty_like(gate);
  launch_gated_activation({.gate = gate.const_data_ptr(),
                           .up = up.const_data_ptr(),
                           .hidden = hidden.mutable_data_ptr(),
                           .size = gate.numel(),
                           .activation = activation_of(activation),
                           .dtype = dtype},
                          context.stream());
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> gated_linear(const Tensor& x, const Tensor& w_gate,
                                                const Tensor& w_up, std::string activation,
                                                bool save) {
  floating_dtype(x, "x");
  for (const auto& [weight, name] : {std::pair(w_gate, "w_gate"), std::pair(w_up, "w_up")}) {
    check_device(weight, name, x);
    check_dtype(weight, name, x.scalar_type());
    check_shape(weight, name, {w_gate.size(0), x.size(x.dim() - 1)});
  }
#ifdef TTF_HAS_SM90
  if (auto outputs = gated_linear_sm90(x, w_gate, w_up, activation_of(activation), save)) {
    return *outputs;
  }
#endif
  const Tensor gate = torch::stable::matmul(x, torch::stable::transpose(w_gate, 0, 1));
  const Tensor up = torch::stable::matmul(x, torch::stable::transpose(w_up, 0, 1));
  const Tensor hidden = gated_activation(gate, up, activation);
  const Tensor none = torch::stable::new_empty(x, {0});
  return save ? Outputs{hidden, gate, up} : Outputs{hidden, none, none};
}

std::tuple<Tensor, Tensor> gated_activation_backward(Tensor grad, const Tensor& gate,
                                                     const Tensor& up, std::string activation,
                                                     bool need_hidden) {
  const DType dtype = floating_dtype(gate, "gate");
  check_contiguous(gate, "gate");
  check_same(up, "up", gate);
  check_same(grad, "grad", gate);
  const LaunchContext context(gate);
  Tensor grad_gate = torch::stable::empty_like(gate);
  Tensor hidden = need_hidden ? torch::stable::empty_like(gate)
                              : torch::stable::new_empty(gate, {0});
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
