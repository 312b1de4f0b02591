#include "rope/dispatch.cuh"
#include "rope/rope.cuh"

namespace torchtune_fused {

void plan_rope(RopeParams& params) {
  for (RopeHeads& heads : params.of) {
    const int64_t tokens = heads.heads > 0 ? params.tokens : 0;
    heads.blocks = static_cast<int>((tokens + kWarps - 1) / kWarps);
  }
}

void launch_rope(const RopeParams& params, cudaStream_t stream) {
  const int blocks = params.of[0].blocks + params.of[1].blocks;
  if (blocks == 0) return;  // an empty grid is an error
  with_layout(params, [&](auto type, auto vec) {
    rope_kernel<decltype(type), vec><<<blocks, 32 * kWarps, 0, stream>>>(params);
  });
  TTF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace torchtune_fused
