// Which cases Hopper's forward kernel takes, and the choice among its instantiations.
#include <atomic>

#include "attention/flash_forward_sm90.cuh"

namespace torchtune_fused {

extern template struct FlashForwardSm90<64>;
extern template struct FlashForwardSm90<128>;

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
  return runs_sm90_code() && (p.head_dim == 64 || p.head_dim == 128) &&
         (p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16) && p.scale > 0 &&
         copyable(p.q, p.q_stride, p.batch, p.heads, p.queries) &&
         copyable(p.k, p.k_stride, p.batch, p.kv_heads, p.keys) &&
         copyable(p.v, p.v_stride, p.batch, p.kv_heads, p.keys) &&
         copyable(p.out, p.out_stride, p.batch, p.heads, p.queries);
}

void launch_flash_forward_sm90(const FlashAttentionParams& params, cudaStream_t stream) {
  switch (params.head_dim) {
    case 64: return FlashForwardSm90<64>::launch(params, next_counter(), stream);
    case 128: return FlashForwardSm90<128>::launch(params, next_counter(), stream);
  }
  raise("Hopper's attention kernel takes a head dimension of 64 or 128, got ", params.head_dim);
}

}  // namespace torchtune_fused
