// What the backward kernels share: the workspace and the work of the passes before and after.
#pragma once

#include "attention/flash_attention.h"

namespace torchtune_fused {

constexpr int kBackwardRows = 128;  // queries are padded to multiples of this in the workspace

// Of one query: ln(sum(exp(score))) in units of log2(e), and the sum of grad_out * out.
struct RowStats {
  float lse, delta;
};

struct FlashBackwardWorkspace {
  RowStats* stats;  // [batch, heads, padded queries]
  // Sums of the gradient of q, before the scale: [batch, heads, padded queries / 16, head_dim / 8],
  // the 16 x 8 values of an mma together, in the order of common/ptx.cuh's add_fragment. Null if
  // deterministic.
  float* grad_q;
  int padded_queries, padded_dim;

  FlashBackwardWorkspace(const FlashAttentionBackwardParams& p, void* memory) {
    const FlashAttentionParams& f = p.forward;
    padded_queries = (f.queries + kBackwardRows - 1) / kBackwardRows * kBackwardRows;
    padded_dim = f.head_dim <= 64 ? 64 : f.head_dim <= 96 ? 96 : f.head_dim <= 128 ? 128 : 256;
    stats = static_cast<RowStats*>(memory);
    grad_q = p.deterministic ? nullptr : reinterpret_cast<float*>(stats + rows(p));
  }
  int64_t rows(const FlashAttentionBackwardParams& p) const {
    return static_cast<int64_t>(p.forward.batch) * p.forward.heads * padded_queries;
  }
  int64_t grad_q_bytes(const FlashAttentionBackwardParams& p) const {
    return p.deterministic ? 0 : rows(p) * padded_dim * static_cast<int64_t>(sizeof(float));
  }
};

}  // namespace torchtune_fused
