// The passes of the backward: the queries' statistics, then the gradients, then dQ in its own type.
#include <algorithm>

#include "attention/flash_backward_passes.cuh"
#include "common/launch.h"
#include "common/tensor_map.h"

namespace torchtune_fused {

// Defined in flash_backward_sm80.cuh and flash_backward_sm90.cuh.
template <int D>
struct FlashBackwardSm80 {
  static void launch(const FlashAttentionBackwardParams& params,
                     const FlashBackwardWorkspace& workspace, cudaStream_t stream);
};
template <int D>
struct FlashBackwardSm90 {
  static void launch(const FlashAttentionBackwardParams& params,
                     const FlashBackwardWorkspace& workspace, cudaStream_t stream);
};

namespace {

#ifdef TTF_HAS_SM90
// Whether Hopper's kernel takes the case.
bool sm90_takes(const FlashAttentionBackwardParams& p) {
  const FlashAttentionParams& f = p.forward;
  return runs_sm90_code() && (f.head_dim == 64 || f.head_dim == 128) && f.scale > 0 &&
         f.softcap == 0 && !p.deterministic &&
         copyable(f.q, f.q_stride, f.batch, f.heads, f.queries) &&
         copyable(f.k, f.k_stride, f.batch, f.kv_heads, f.keys) &&
         copyable(f.v, f.v_stride, f.batch, f.kv_heads, f.keys) &&
         copyable(p.grad_out, p.grad_out_stride, f.batch, f.heads, f.queries);
}
#endif

void launch_gradients(const FlashAttentionBackwardParams& p,
                      const FlashBackwardWorkspace& workspace, cudaStream_t stream) {
#ifdef TTF_HAS_SM90
  if (sm90_takes(p)) {
    if (p.forward.head_dim == 64) return FlashBackwardSm90<64>::launch(p, workspace, stream);
    return FlashBackwardSm90<128>::launch(p, workspace, stream);
  }
#endif
  switch (workspace.padded_dim) {
    case 64: return FlashBackwardSm80<64>::launch(p, workspace, stream);
    case 96: return FlashBackwardSm80<96>::launch(p, workspace, stream);
    case 128: return FlashBackwardSm80<128>::launch(p, workspace, stream);
    default: return FlashBackwardSm80<256>::launch(p, workspace, stream);
  }
}

template <typename T>
void launch_passes(const FlashAttentionBackwardParams& p, const FlashBackwardWorkspace& workspace,
                   cudaStream_t stream) {
  const FlashAttentionParams& f = p.forward;
  const bool turns = turns_vectors(p) && !p.deterministic;
  const int64_t stats_blocks = workspace.rows(p) / kBackwardRows;
  const int64_t groups = (f.heads + (turns ? f.kv_heads : 0) + kConvertHeads - 1) / kConvertHeads;
  const int64_t convert_blocks = workspace.rows(p) / f.heads / kConvertRows * groups;
  TTF_CHECK(std::max(stats_blocks, convert_blocks) < int64_t{1} << 31, "too many queries: ",
            workspace.rows(p));
  const int d = workspace.padded_dim;
  const auto row_stats = d == 64    ? row_stats_kernel<T, 8>
                         : d <= 128 ? row_stats_kernel<T, 16>
                                    : row_stats_kernel<T, 32>;
  launch_waiting(row_stats, static_cast<unsigned>(stats_blocks), kPassThreads, 0, stream, p,
                 workspace);
  launch_gradients(p, workspace, stream);
  if (!p.deterministic) {
    launch_waiting(convert_kernel<T>, static_cast<unsigned>(convert_blocks), kPassThreads, 0,
                   stream, p, workspace, turns);
  }
  if (p.rope.cos == nullptr || turns) return;
  RopeParams rope = p.rope;
  plan_rope(rope);
  launch_rope(rope, stream);
}

}  // namespace

int64_t flash_backward_workspace(const FlashAttentionBackwardParams& p) {
  const FlashBackwardWorkspace workspace(p, nullptr);
  return workspace.rows(p) * static_cast<int64_t>(sizeof(RowStats)) + workspace.grad_q_bytes(p);
}

void launch_flash_backward(const FlashAttentionBackwardParams& p, void* memory,
                           cudaStream_t stream) {
  const int d = p.forward.head_dim;
  TTF_CHECK(d > 0 && d <= 256 && d % 8 == 0,
            "the head dimension must be a multiple of 8 up to 256, got ", d);
  TTF_CHECK(p.forward.length == nullptr, "the backward takes no length");
  TTF_CHECK(p.forward.batch > 0 && p.forward.queries > 0 && p.forward.keys > 0,
            "the backward needs at least one query and one key, got ", p.forward.batch,
            " batches of ", p.forward.queries, " queries and ", p.forward.keys, " keys");
  const FlashBackwardWorkspace workspace(p, memory);
  if (p.forward.dtype == DType::kFloat16) {
    launch_passes<__half>(p, workspace, stream);
  } else {
    launch_passes<__nv_bfloat16>(p, workspace, stream);
  }
}

}  // namespace torchtune_fused
