#include <algorithm>

#include "common/launch.h"
#include "rope/dispatch.cuh"
#include "rope/rope_backward.cuh"

namespace torchtune_fused {

void plan_rope_backward(RopeParams& params) {
  int per_sm = 0;
  with_layout(params, [&](auto type, auto vec) {
    params.lane_bits = lane_bits_of(params, vec);
    TTF_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_sm, rope_backward_kernel<decltype(type), vec>, 32 * kWarps, 0));
  });
  const int64_t wave = int64_t{per_sm} * device_properties().num_sms;
  const int64_t needed = (params.tokens + kWarps - 1) / kWarps;
  const int heads = params.of[0].heads + params.of[1].heads;
  for (RopeHeads* part : {&params.of[0], &params.of[1]}) {
    const int64_t share = heads > 0 ? wave * part->heads / heads : 0;
    part->blocks = static_cast<int>(std::min(needed, std::max<int64_t>(share, 1)));
  }
}

void launch_rope_backward(const RopeParams& params, cudaStream_t stream) {
  const int blocks = params.of[0].blocks + params.of[1].blocks;
  if (blocks == 0) return;  // an empty grid is an error
  with_layout(params, [&](auto type, auto vec) {
    launch_waiting(rope_backward_kernel<decltype(type), vec>, blocks, 32 * kWarps, 0, stream,
                   params);
  });
}

}  // namespace torchtune_fused
