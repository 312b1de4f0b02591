// Sampling: what the host hands to the kernels, and their launches.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

constexpr int kSampleBlocks = 64;  // that share a row of logits

struct SampleParams {
  const float* logits;  // [rows, vocab]
  int64_t* tokens;      // [rows]
  int64_t* rng_state;   // seed and offset, on the device; the offset is advanced by one
  uint64_t* best;       // workspace [rows, kSampleBlocks]
  float inverse_temperature;  // 0: greedy
  int rows;
  int vocab;
};

void launch_sample(const SampleParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
