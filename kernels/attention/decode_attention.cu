// Chooses among the instantiations of decode_attention.cuh, and how many splits to use.
#include <atomic>

#include "attention/decode_attention.cuh"

namespace torchtune_fused {

extern template struct DecodeAttention<64, false>;
extern template struct DecodeAttention<80, false>;
extern template struct DecodeAttention<96, false>;
extern template struct DecodeAttention<128, false>;
extern template struct DecodeAttention<256, false>;
#ifdef TTF_HAS_SM90
extern template struct DecodeAttention<64, true>;
extern template struct DecodeAttention<80, true>;
extern template struct DecodeAttention<96, true>;
extern template struct DecodeAttention<128, true>;
extern template struct DecodeAttention<256, true>;
#endif

namespace {

constexpr int kMaxSplits = 64;
constexpr int kLeastKeys = 64;  // of a split
// Splits that may form a cluster. A larger one finds room too late: all of its blocks start at
// once, in one part of the GPU.
constexpr int kMaxCluster = 2;

template <bool kClustered>
void launch(const DecodeAttentionParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64:
      return DecodeAttention<64, kClustered>::launch(p, stream);
    case 80:
      return DecodeAttention<80, kClustered>::launch(p, stream);
    case 96:
      return DecodeAttention<96, kClustered>::launch(p, stream);
    case 128:
      return DecodeAttention<128, kClustered>::launch(p, stream);
    case 256:
      return DecodeAttention<256, kClustered>::launch(p, stream);
  }
  raise("the head dimension must be 64, 80, 96, 128 or 256, got ", p.head_dim);
}

int64_t tile_count(const DecodeAttentionParams& p) {
  const int64_t rows = static_cast<int64_t>(p.heads) / p.kv_heads * p.steps;
  return p.batch * p.kv_heads * ((rows + kRows - 1) / kRows);
}

// Counters of the blocks that have arrived at each row tile. Launches that run at the same time, on
// several streams, need different ones, and a captured launch keeps its own: each takes the next of
// a pool that comes round only after a hundred thousand launches. A launch leaves them at zero.
constexpr uint32_t kArrivals = 1 << 20;
__device__ unsigned arrivals[kArrivals];

unsigned* next_arrivals(int64_t count) {
  static std::atomic<uint32_t> next = 0;
  uint32_t first = next.load(), taken;
  do {
    taken = first + count <= kArrivals ? first : 0;
  } while (!next.compare_exchange_weak(first, static_cast<uint32_t>(taken + count)));
  void* pool = nullptr;
  TTF_CUDA_CHECK(cudaGetSymbolAddress(&pool, arrivals));
  return static_cast<unsigned*>(pool) + taken;
}

bool aligned(const void* data, const int64_t (&strides)[3]) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 8 == 0 &&
         strides[1] % 8 == 0 && strides[2] % 8 == 0;
}

}  // namespace

bool decode_attention_is_fast(const DecodeAttentionParams& p) {
  const bool half = p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16;
  const int d = p.head_dim;
  return half && (d == 64 || d == 80 || d == 96 || d == 128 || d == 256) &&
         aligned(p.q, p.q_stride) && aligned(p.k, p.k_stride) && aligned(p.v, p.v_stride);
}

int64_t plan_decode_attention(DecodeAttentionParams& p) {
  // One block per SM, all at once or in waves that are nearly full: the fewest splits within 4% of
  // the best use of the SMs.
  const int64_t tiles = tile_count(p);
  const int64_t slots = device_properties().num_sms;
  const int64_t most = (p.max_len + kLeastKeys - 1) / kLeastKeys;
  const auto use = [&](int64_t splits) {
    const int64_t blocks = tiles * splits, waves = (blocks + slots - 1) / slots;
    return static_cast<double>(blocks) / static_cast<double>(waves * slots);
  };
  double best = 0.0;
  for (int64_t splits = 1; splits <= kMaxSplits && splits <= most; ++splits) {
    best = use(splits) > best ? use(splits) : best;
  }
  p.splits = 1;
  while (use(p.splits) < best - 0.04) ++p.splits;
  if (runs_sm90_code() && p.splits <= kMaxCluster) {
    const int rows = std::min(p.heads / p.kv_heads * p.steps, kRows);
    p.inbox_bytes = Inbox::bytes(rows * p.head_dim / 4, p.splits);
  }
  if (p.splits == 1 || p.inbox_bytes > 0) return 0;
  return tiles * p.splits * kRows * (p.head_dim + 2);
}

void use_workspace(DecodeAttentionParams& p, float* workspace) {
  p.partial_out = workspace;
  p.partial_stat =
      reinterpret_cast<float2*>(workspace + tile_count(p) * p.splits * kRows * p.head_dim);
}

void launch_decode_attention(const DecodeAttentionParams& params, cudaStream_t stream) {
  DecodeAttentionParams p = params;
  p.reads_ahead = may_read_cache_ahead(stream);
#ifdef TTF_HAS_SM90
  if (p.inbox_bytes > 0) return launch<true>(p, stream);
#endif
  if (p.splits > 1) p.arrivals = next_arrivals(tile_count(p));
  launch<false>(p, stream);
}

}  // namespace torchtune_fused
