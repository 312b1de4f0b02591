// The gated MLP: what the host hands to the kernels, and their launches.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cuda_utils.h"

namespace torchtune_fused {

// hidden = activation(gate) * up; all of `size` elements, contiguous. hidden may be gate or up.
struct GatedActivationParams {
  const void* gate;
  const void* up;
  void* hidden;
  int64_t size;
  Activation activation;
  DType dtype;
};

// The gradients of gate and up from that of hidden. Each output may be one of the inputs.
struct GatedActivationBackwardParams {
  const void* grad;
  const void* gate;
  const void* up;
  void* hidden;  // computed again; null: not wanted
  void* grad_gate;
  void* grad_up;
  int64_t size;
  Activation activation;
  DType dtype;
};

// hidden = activation(x gate_weight^T) * (x up_weight^T), the sums rounded once, after the product.
struct GatedLinearParams {
  const void* x;            // [rows, k]
  const void* gate_weight;  // [n, k]
  const void* up_weight;    // [n, k]
  void* hidden;             // [rows, n]
  void* gate;               // [rows, n]: the projections before the activation
  void* up;                 // [rows, n]; both null: not wanted
  int rows, n, k;
  Activation activation;
  DType dtype;
};

#ifdef TTF_HAS_SM90
// Hopper's way: whether it takes the case, and its launch.
bool gated_linear_sm90_takes(const GatedLinearParams& params);
void launch_gated_linear_sm90(const GatedLinearParams& params, cudaStream_t stream);
#endif

void launch_gated_activation(const GatedActivationParams& params, cudaStream_t stream);
void launch_gated_activation_backward(const GatedActivationBackwardParams& params,
                                      cudaStream_t stream);

}  // namespace torchtune_fused
