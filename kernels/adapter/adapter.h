// Low-rank adapters: what the host hands to the kernels, and their launches.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

constexpr int kMaxAdapters = 3;
constexpr int kAdapterRank = 16;      // at most; smaller ones are filled up with zeros
constexpr int kMinAdapterRows = 512;  // below, two small products are as fast
constexpr int kAdapterColumns = 512;  // of a block
constexpr int kChunk = 64;            // tokens whose products are summed up at a time

struct AdapterLayer {
  const void* grad;  // [rows, n]
  const void* b;     // [n, rank]
  void* grad_b;      // [n, rank]
  int n, rank;       // multiples of 8
  int start;         // its first column of low
  int column_blocks;
  int64_t low_partial, b_partial;  // where its partial sums begin
};

// grad_low = scale * grad b and grad_b = grad^T low of each layer.
struct AdapterBackwardParams {
  AdapterLayer layers[kMaxAdapters];
  int count;
  const void* low;  // [rows, ranks]
  void* grad_low;   // [rows, ranks]
  float* partial;
  int rows, ranks;
  int chunks, chunks_per_block, token_blocks;  // of 64 rows
  float scale;
  DType dtype;
};

// Sets how the work is divided, for layers whose n and rank are set, and rows.
// Returns how many floats of partial sums that takes.
int64_t plan_adapter_backward(AdapterBackwardParams& params);

void launch_adapter_backward(const AdapterBackwardParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
