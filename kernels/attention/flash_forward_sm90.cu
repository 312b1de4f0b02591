// Which cases Hopper's forward kernel takes, and the choice among its instantiations.
#include <atomic>

#include "attention/flash_forward_sm90.cuh"

namespace torchtune_fused {

extern template struct FlashForwardSm90<64>;
extern template struct FlashForwardSm90<96>;
extern template struct FlashForwardSm90<128>;
extern template struct FlashForwardSm90<256>;

namespace {

// Launches that run at the same time, on several streams, need different counters, and a captured
// launch keeps its own: each takes the next of a pool that comes round after 65,536 launches.
constexpr uint32_t kCounters = 1 << 16;
__device__ TileCounter counters[kCounters];

TileCounter* next_counter() {
  static std::atomic<uint32_t> next = 0;
  void* pool = nullptr;
  TTF_CUDA_CHECK(cudaGetSymbolAddress(&pool, counters));
  return static_cast<TileCounter*>(pool) + next++ % kCounters;
}

}  // namespace

bool flash_forward_sm90_takes(const FlashAttentionParams& p) {
  return runs_sm90_code() && p.head_dim > 0 && p.head_dim <= 256 && p.head_dim % 8 == 0 &&
         (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && p.scale > 0 &&
         copyable(p.q, p.q_stride, p.batch, p.heads, p.queries) &&
         copyable(p.k, p.k_stride, p.batch, p.kv_heads, p.keys) &&
         copyable(p.v, p.v_stride, p.batch, p.kv_heads, p.keys) &&
         copyable(p.out, p.out_stride, p.batch, p.heads, p.queries);
}

void launch_flash_forward_sm90(const FlashAttentionParams& params, cudaStream_t stream) {
  const int d = params.head_dim;
  TTF_CHECK(d > 0 && d <= 256 && d % 8 == 0,
            "the head dimension must be a multiple of 8 up to 256, got ", d);
  if (d <= 64) return FlashForwardSm90<64>::launch(params, next_counter(), stream);
  if (d <= 96) return FlashForwardSm90<96>::launch(params, next_counter(), stream);
  if (d <= 128) return FlashForwardSm90<128>::launch(params, next_counter(), stream);
  FlashForwardSm90<256>::launch(params, next_counter(), stream);
}

}  // namespace torchtune_fused
