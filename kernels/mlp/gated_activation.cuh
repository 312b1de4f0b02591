// activation(gate) * up and its gradients, element by element (Shazeer, 2020).
//
// Grid: one block per kThreads * kVectors vectors of kWidth elements. A thread loads its vectors,
// which lie kThreads apart, before it computes with any of them.
#pragma once

#include "common/activation.cuh"
#include "common/ptx.cuh"
#include "common/types.cuh"
#include "mlp/mlp.h"

namespace torchtune_fused {

constexpr int kGatedThreads = 256;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T of[kWidth];
};

template <typename T, int kWidth, int kVectors>
__global__ void __launch_bounds__(kGatedThreads) gated_activation_kernel(GatedActivationParams p) {
  wait_for_grid();
  using V = Vector<T, kWidth>;
  using F = AccOf<T>;
  const V* gates = static_cast<const V*>(p.gate);
  const V* ups = static_cast<const V*>(p.up);
  const int64_t first = int64_t(blockIdx.x) * kGatedThreads * kVectors + threadIdx.x;
  const int64_t size = p.size / kWidth;

  V gate[kVectors], up[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = first + v * kGatedThreads;
    if (i < size) gate[v] = gates[i], up[v] = ups[i];
  }
  with_activation(p.activation, [&](auto activation) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = first + v * kGatedThreads;
      if (i >= size) return;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        gate[v].of[j] = T(activate<activation.value>(F(gate[v].of[j])) * F(up[v].of[j]));
      }
      static_cast<V*>(p.hidden)[i] = gate[v];
    }
  });
}

template <typename T, int kWidth, int kVectors>
__global__ void __launch_bounds__(kGatedThreads)
    gated_activation_backward_kernel(GatedActivationBackwardParams p) {
  wait_for_grid();
  using V = Vector<T, kWidth>;
  using F = AccOf<T>;
  const V* grads = static_cast<const V*>(p.grad);
  const V* gates = static_cast<const V*>(p.gate);
  const V* ups = static_cast<const V*>(p.up);
  const int64_t first = int64_t(blockIdx.x) * kGatedThreads * kVectors + threadIdx.x;
  const int64_t size = p.size / kWidth;

  V grad[kVectors], gate[kVectors], up[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = first + v * kGatedThreads;
    if (i < size) grad[v] = grads[i], gate[v] = gates[i], up[v] = ups[i];
  }
  with_activation(p.activation, [&](auto activation) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t i = first + v * kGatedThreads;
      if (i >= size) return;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const F g = F(grad[v].of[j]), u = F(up[v].of[j]);
        const ValueAndSlope<F> a = activate_with_slope<activation.value>(F(gate[v].of[j]));
        grad[v].of[j] = T(a.value * u);
        gate[v].of[j] = T(g * u * a.slope);
        up[v].of[j] = T(g * a.value);
      }
      if (p.hidden) static_cast<V*>(p.hidden)[i] = grad[v];
      static_cast<V*>(p.grad_gate)[i] = gate[v];
      static_cast<V*>(p.grad_up)[i] = up[v];
    }
  });
}

}  // namespace torchtune_fused
