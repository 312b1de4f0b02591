// Sampling: what the host hands to the kernels, and their launches.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

constexpr int kSliceTokens = 2048;  // of the vocabulary, for one block
constexpr int kDistanceBins = 2048;

// A token that may be kept or not: its logit's rank decides, then the rank of its perturbed score.
struct alignas(16) Candidate {
  uint64_t rank;
  uint64_t drawn;
};

// What the kernels of one call tell each other about a row.
struct RowState {
  uint64_t histogram[kDistanceBins];  // tokens, or their mass, by distance from the largest logit
  uint64_t num_candidates;
  uint64_t remaining;  // of the candidates' tokens or mass, to be kept
};

struct SampleParams {
  const float* logits;    // [rows, vocab]
  int64_t* tokens;        // [rows]
  int64_t* rng_state;     // seed and offset, on the device; the offset is advanced by one
  uint64_t* best_logit;   // workspace [rows, slices]
  uint64_t* best_drawn;   // workspace [rows, slices], without it the largest logit is taken
  RowState* states;       // workspace [rows], where something is filtered
  Candidate* candidates;  // workspace [rows, vocab], likewise
  double top_p;           // 1: no such filter
  float inverse_temperature;
  int top_k;  // 0: no such filter
  int rows;
  int vocab;
  int slices;
  bool aligned;  // rows of logits start at multiples of 16 bytes
};

// What a cluster of blocks holds in its registers, and can bound well by its warps' maxima.
constexpr int kClusterVocab = 1 << 18, kClusterTopK = 512;

void launch_sample(const SampleParams& params, cudaStream_t stream);

// Top-k, alone or with top-p, in one launch and without a workspace: for at most kClusterVocab and
// kClusterTopK, where runs_sm90_code().
void launch_top_k(const SampleParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
