#include <algorithm>
#include <cassert>

#include "common/launch.h"
#include "rope/dispatch.cuh"
#include "rope/rope.cuh"

namespace torchtune_fused {

void plan_rope(RopeParams& params) {
  with_layout(params, [&](auto, auto vec) { params.lane_bits = lane_bits_of(params, vec); });
  const int at_once = 32 >> params.lane_bits;
  int64_t most = 1, all = 0;
  for (RopeHeads& heads : params.of) {
    const int64_t rounds = (heads.heads + at_once - 1) / at_once;
    most = std::max(most, rounds);
    all += rounds;
    heads.blocks = rounds > 0 ? static_cast<int>((params.tokens + kWarps - 1) / kWarps) : 0;
  }
  // Few tokens spread their heads over more warps, as long as all of those run at once.
  const int64_t wave = int64_t{device_properties().num_sms} * 16;
  const int64_t rounds = std::clamp<int64_t>((params.tokens * all + wave - 1) / wave, 1, most);
  params.heads_per_warp = static_cast<int>(rounds) * at_once;
}

__global__ void advance_kernel(int64_t* cache_pos, int64_t length, int steps) {
  wait_for_grid();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < length) cache_pos[i] += steps;
  if (i == 0) assert(cache_pos[0] <= length && "the KV cache is full");
}

void launch_rope(const RopeParams& params, cudaStream_t stream) {
  const int blocks = params.of[0].blocks + params.of[1].blocks + params.of[2].blocks;
  if (blocks == 0) return;  // an empty grid is an error
  int most = 0;
  for (const RopeHeads& heads : params.of) most = std::max(most, heads.heads);
  const dim3 grid(blocks, (most + params.heads_per_warp - 1) / params.heads_per_warp);
  with_layout(params, [&](auto type, auto vec) {
    launch_waiting(rope_kernel<decltype(type), vec>, grid, 32 * kWarps, 0, stream, params);
  });
  if (params.cache_pos) {
    constexpr int kThreads = 256;
    const int64_t length = params.cache_len;
    launch_waiting(advance_kernel, static_cast<unsigned>((length + kThreads - 1) / kThreads),
                   kThreads, 0, stream, params.cache_pos, length, params.steps);
  }
}

}  // namespace torchtune_fused
