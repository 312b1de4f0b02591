#include <algorithm>

#include "common/launch.h"
#include "loss/cross_entropy.cuh"

namespace torchtune_fused {
namespace {

template <typename T, bool kSoftcap>
void launch(const CrossEntropyParams& p, cudaStream_t stream) {
  const int64_t vectors = p.vocab / Vector<T>::kWidth;
  constexpr int kStatic = sizeof(LogSumExp<AccOf<T>>) * (kThreads / 32);
  const int64_t room = (device_properties().max_shared_per_block - kStatic) / 16;
  const int cached = p.backward ? static_cast<int>(std::min(vectors, room)) : 0;
  allow_shared_memory(cross_entropy_kernel<T, kSoftcap>, cached * 16);
  cross_entropy_kernel<T, kSoftcap>
      <<<static_cast<unsigned>(p.rows), kThreads, cached * 16, stream>>>(p, cached);
  TTF_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void launch(const CrossEntropyParams& p, cudaStream_t stream) {
  p.softcap > 0 ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
}

}  // namespace

void launch_cross_entropy(const CrossEntropyParams& params, cudaStream_t stream) {
  if (params.rows == 0) return;  // an empty grid is an error
  with_type(params.dtype, [&](auto element) { launch<decltype(element)>(params, stream); });
}

}  // namespace torchtune_fused
