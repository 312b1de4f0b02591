// The gradient of an embedding: what the host hands to the kernel, and its launch.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

struct EmbeddingAddParams {
  void* grad_weight;     // [vocab, dim]
  const int64_t* ids;    // [tokens], rows of it
  const int64_t* order;  // [tokens], which sorts ids, those of one id as they come
  const void* grad;      // [tokens, dim]
  int64_t tokens, dim;
  DType dtype;
};

// grad_weight[ids[i]] += grad[i] for each i.
void launch_embedding_add(const EmbeddingAddParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
