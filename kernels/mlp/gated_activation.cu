#include "mlp/gated_activation.cuh"

#include "common/launch.h"

namespace torchtune_fused {
namespace {

template <typename... Pointers>
bool aligned_to_16(Pointers... pointers) {
  return (... && (reinterpret_cast<uintptr_t>(pointers) % 16 == 0));
}

unsigned blocks_for(int64_t size, int per_thread) {
  const int64_t per_block = int64_t(kGatedThreads) * per_thread;
  return static_cast<unsigned>((size + per_block - 1) / per_block);
}

}  // namespace

void launch_gated_activation(const GatedActivationParams& p, cudaStream_t stream) {
  if (p.size == 0) return;  // an empty grid is an error
  with_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = 16 / sizeof(T), kVectors = 2;
    if (p.size % kWidth == 0 && aligned_to_16(p.gate, p.up, p.hidden)) {
      launch_waiting(gated_activation_kernel<T, kWidth, kVectors>,
                     blocks_for(p.size, kWidth * kVectors), kGatedThreads, 0, stream, p);
    } else {
      launch_waiting(gated_activation_kernel<T, 1, 1>, blocks_for(p.size, 1), kGatedThreads, 0,
                     stream, p);
    }
  });
}

void launch_gated_activation_backward(const GatedActivationBackwardParams& p,
                                      cudaStream_t stream) {
  if (p.size == 0) return;
  with_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = 16 / sizeof(T);
    if (p.size % kWidth == 0 &&
        aligned_to_16(p.grad, p.gate, p.up, p.hidden, p.grad_gate, p.grad_up)) {
      launch_waiting(gated_activation_backward_kernel<T, kWidth, 1>, blocks_for(p.size, kWidth),
                     kGatedThreads, 0, stream, p);
    } else {
      launch_waiting(gated_activation_backward_kernel<T, 1, 1>, blocks_for(p.size, 1),
                     kGatedThreads, 0, stream, p);
    }
  });
}

}  // namespace torchtune_fused
