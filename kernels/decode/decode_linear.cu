// y = x W^T (+ bias) (+ residual): output and down projections, and the LM head in fp32.
#include "decode/stream_linear.cuh"

namespace torchtune_fused {
namespace {

template <typename T, typename Out, bool kParts = false>
struct LinearJob {
  DecodeLinearParams p;

  struct Operands {
    float a, b;  // bias + residual
  };

  __host__ __device__ int pairs() const { return static_cast<int>((p.n + 1) / 2); }
  static constexpr bool kLetsCacheBeRead = false;
  static constexpr bool kMergesParts = kParts;
  static constexpr bool kMayBeDeep = false;

  __device__ const T* row(int pair, int side) const {
    const int64_t n = 2 * static_cast<int64_t>(pair) + side;
    return n < p.n ? static_cast<const T*>(p.weight) + n * p.in.k : nullptr;
  }

  __device__ Operands load(int pair, int token) const {
    const auto one = [&](int64_t n) {
      float value = 0.f;
      if (n < p.n && p.bias) value += static_cast<float>(static_cast<const T*>(p.bias)[n]);
      if (n < p.n && p.residual) {
        value += static_cast<float>(static_cast<const T*>(p.residual)[token * p.n + n]);
      }
      return value;
    };
    const int64_t n = 2 * static_cast<int64_t>(pair);
    return {one(n), one(n + 1)};
  }

  __device__ void store(int pair, int token, float a, float b, const Operands& add) const {
    const int64_t n = 2 * static_cast<int64_t>(pair);
    Out* out = static_cast<Out*>(p.out) + token * p.n + n;
    out[0] = Out(a + add.a);
    if (n + 1 < p.n) out[1] = Out(b + add.b);
  }
};

template <typename T>
void launch(const DecodeLinearParams& p, cudaStream_t stream) {
  if (p.in.parts.outs != nullptr) {
    launch_stream_linear<T>(p.in, LinearJob<T, T, true>{p}, stream);
  } else if (p.fp32_out) {
    launch_stream_linear<T>(p.in, LinearJob<T, float>{p}, stream);
  } else {
    launch_stream_linear<T>(p.in, LinearJob<T, T>{p}, stream);
  }
}

}  // namespace

bool tokens_need_scratch(const TokensParams& in) {
  if (in.norm_weight == nullptr || fits(in, true)) return false;
  return in.dtype == DType::kFloat16 || !fits(in, false);
}

void launch_decode_linear(const DecodeLinearParams& p, cudaStream_t stream) {
  if (p.in.tokens == 0) return;
  p.in.dtype == DType::kFloat16 ? launch<__half>(p, stream) : launch<__nv_bfloat16>(p, stream);
}

}  // namespace torchtune_fused
