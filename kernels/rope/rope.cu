#include <cassert>

#include "common/launch.h"
#include "rope/dispatch.cuh"
#include "rope/rope.cuh"

namespace torchtune_fused {

void plan_rope(RopeParams& params) {
  for (RopeHeads& heads : params.of) {
    const int64_t tokens = heads.heads > 0 ? params.tokens : 0;
    heads.blocks = static_cast<int>((tokens + kWarps - 1) / kWarps);
  }
}

__global__ void advance_kernel(int64_t* cache_pos, int64_t length, int steps) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < length) cache_pos[i] += steps;
  if (i == 0) assert(cache_pos[0] <= length && "the KV cache is full");
}

void launch_rope(const RopeParams& params, cudaStream_t stream) {
  const int blocks = params.of[0].blocks + params.of[1].blocks + params.of[2].blocks;
  if (blocks == 0) return;  // an empty grid is an error
  with_layout(params, [&](auto type, auto vec) {
    launch_waiting(rope_kernel<decltype(type), vec>, blocks, 32 * kWarps, 0, stream, params);
  });
  if (params.cache_pos) {
    constexpr int kThreads = 256;
    const int64_t length = params.cache_len;
    advance_kernel<<<(length + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
        params.cache_pos, length, params.steps);
    TTF_CUDA_CHECK(cudaGetLastError());
  }
}

}  // namespace torchtune_fused
