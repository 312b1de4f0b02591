// Rows of the embedding, ahead of a captured step: they are where its graph reads them, without a
// copy, soon after the tokens are known.
#include "common/launch.h"
#include "common/ptx.cuh"
#include "decode/decode.h"

namespace torchtune_fused {
namespace {

constexpr int kThreads = 256;

// Grid: one block per token. Block: kThreads threads that stride over its row in 16-byte pieces.
__global__ void __launch_bounds__(kThreads)
    decode_embed_kernel(const __grid_constant__ DecodeEmbedParams p) {
  launch_dependents();
  wait_for_grid();
  const int64_t id = p.ids[blockIdx.x];
  if (id < 0 || id >= p.vocab) __trap();  // CUDA's error for the whole process, as in PyTorch
  const uint4* row = static_cast<const uint4*>(p.weight) + id * p.pieces;
  uint4* out = static_cast<uint4*>(p.out) + blockIdx.x * p.pieces;
  for (int64_t i = threadIdx.x; i < p.pieces; i += kThreads) out[i] = row[i];
}

}  // namespace

void launch_decode_embed(const DecodeEmbedParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return;
  allow_shared_memory(decode_embed_kernel, 0);
  launch_waiting(decode_embed_kernel, p.tokens, kThreads, 0, stream, p);
}

}  // namespace torchtune_fused
