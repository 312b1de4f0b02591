#include <algorithm>

#include "common/launch.h"
#include "loss/cross_entropy.cuh"

namespace torchtune_fused {
namespace {

template <typename T>
constexpr int inbox_bytes() {
  return kWarps * sizeof(LogSumExp<AccOf<T>>);
}

// Vectors that a block has room for in shared memory, where an SM is to hold so many blocks.
template <typename T>
int64_t room_for(int blocks, int cluster) {
  constexpr int kReserved = 1024;  // of each block, by CUDA
  const int bytes = (device_properties().max_shared_per_block + kReserved) / blocks - kReserved;
  return (bytes - cluster * inbox_bytes<T>()) / 16;
}

template <typename T, bool kSoftcap>
void launch(const CrossEntropyParams& p, cudaStream_t stream) {
  const int64_t vectors = p.backward ? p.vocab / Vector<T>::kWidth : 0;  // to be kept
  const auto share = [vectors](int cluster) { return (vectors + cluster - 1) / cluster; };
  const int blocks = runs_sm90_code() ? kBlocksPerSm<T, kSoftcap> : 1;
  int cluster = 1;
  while (runs_sm90_code() && cluster < kMaxCluster &&
         share(cluster) > room_for<T>(blocks, cluster)) {
    cluster *= 2;
  }
  const int room = static_cast<int>(std::min(share(cluster), room_for<T>(blocks, cluster)));
  const size_t shared_bytes = 16 * room + cluster * inbox_bytes<T>();
  const auto kernel = cross_entropy_kernel<T, kSoftcap>;
  allow_shared_memory(kernel, shared_bytes);
  launch_in_clusters(kernel, runs_sm90_code(), cluster, static_cast<unsigned>(p.rows * cluster),
                     kThreads, shared_bytes, stream, p, room);
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
