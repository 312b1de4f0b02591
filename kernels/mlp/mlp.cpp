// The gated MLP: checks on the tensors, and the launches.
#include "mlp/mlp.h"

#include <optional>
#include <string>
#include <tuple>

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
