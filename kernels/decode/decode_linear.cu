// y = x W^T (+ bias) (+ residual): output and down projections, and the LM head in fp32.
#include "decode/stream_linear.cuh"

namespace torchtune_fused {
namespace {

template <typename T, typename Out>
struct LinearJob {
  DecodeLinearParams p;

  struct Operands {
    float a, b;  // bias + residual
  };

  static __host__ __device__ int tiles_of(int64_t n) {
    return static_cast<int>((n + 2 * kPairs - 1) / (2 * kPairs));
  }
  __device__ int tiles() const { return tiles_of(p.n); }

  __device__ int64_t index(int tile, int pair) const {
    return static_cast<int64_t>(tile) * 2 * kPairs + 2 * pair;
  }

  __device__ const T* row(int tile, int pair, int side) const {
    const int64_t n = index(tile, pair) + side;
    return n < p.n ? static_cast<const T*>(p.weight) + n * p.in.k : nullptr;
  }

  __device__ Operands load(int tile, int pair, int token) const {
    const auto one = [&](int64_t n) {
      float value = 0.f;
      if (n < p.n && p.bias) value += static_cast<float>(static_cast<const T*>(p.bias)[n]);
      if (n < p.n && p.residual) {
        value += static_cast<float>(static_cast<const T*>(p.residual)[token * p.n + n]);
      }
      return value;
    };
    const int64_t n = index(tile, pair);
    return {one(n), one(n + 1)};
  }

  __device__ void store(int tile, int pair, int token, float a, float b, const Operands& add) const {
    const int64_t n = index(tile, pair);
    Out* out = static_cast<Out*>(p.out) + token * p.n + n;
    if (n < p.n) out[0] = Out(a + add.a);
    if (n + 1 < p.n) out[1] = Out(b + add.b);
  }
};

template <typename T>
void launch(const DecodeLinearParams& p, cudaStream_t stream) {
  const int tiles = LinearJob<T, T>::tiles_of(p.n);
  if (p.fp32_out) {
    launch_stream_linear<T>(p.in, LinearJob<T, float>{p}, tiles, stream);
  } else {
    launch_stream_linear<T>(p.in, LinearJob<T, T>{p}, tiles, stream);
  }
}

}  // namespace

bool tokens_need_scratch(const TokensParams& in) {
  return in.norm_weight != nullptr && !tokens_are_resident(in);
}

void launch_decode_linear(const DecodeLinearParams& p, cudaStream_t stream) {
  if (p.in.tokens == 0) return;
  p.in.dtype == DType::kFloat16 ? launch<__half>(p, stream) : launch<__nv_bfloat16>(p, stream);
}

}  // namespace torchtune_fused
