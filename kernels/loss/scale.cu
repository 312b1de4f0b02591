// x *= factor, where the factor is known on the device only.
//
// A gradient is scaled by the loss's upstream gradient, which mostly is 1: then nothing is touched.
// Grid: enough blocks to fill the GPU, which stride over x [n] by 16-byte vectors.
#include <algorithm>

#include "loss/cross_entropy.cuh"

namespace torchtune_fused {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(ScaleParams p) {
  using Acc = AccOf<T>;
  constexpr int kWidth = Vector<T>::kWidth;
  const Acc factor = *static_cast<const Acc*>(p.factor);
  if (factor == 1) return;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t num_vectors = p.n / kWidth, step = static_cast<int64_t>(gridDim.x) * kThreads;
  auto* vectors = static_cast<Vector<T>*>(p.x);
  for (int64_t i = thread; i < num_vectors; i += step) {
    Vector<T> v = vectors[i];
#pragma unroll
    for (T& value : v.values) value = static_cast<T>(static_cast<Acc>(value) * factor);
    vectors[i] = v;
  }
  const int64_t tail = num_vectors * kWidth + thread;
  if (tail < p.n) {
    T& value = static_cast<T*>(p.x)[tail];
    value = static_cast<T>(static_cast<Acc>(value) * factor);
  }
}

template <typename T>
void launch(const ScaleParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.n / Vector<T>::kWidth + kThreads) / kThreads;
  const int64_t fill = 4 * device_properties().num_sms;
  scale_kernel<T><<<static_cast<unsigned>(std::min(blocks, fill)), kThreads, 0, stream>>>(p);
  TTF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void launch_scale(const ScaleParams& params, cudaStream_t stream) {
  with_type(params.dtype, [&](auto element) { launch<decltype(element)>(params, stream); });
}

}  // namespace torchtune_fused
