// activation(x gate^T) * (x up^T): a pair is one row of gate and the same row of up.
#include "decode/stream_linear.cuh"

namespace torchtune_fused {
namespace {

__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kSilu: return x / (1.f + __expf(-x));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.f + tanhf(0.7978845608f * fmaf(0.044715f * x * x, x, x)));
    case Activation::kGelu: return 0.5f * x * (1.f + erff(0.7071067812f * x));
    case Activation::kRelu: return x > 0.f || isnan(x) ? x : 0.f;
  }
  return x;
}

template <typename T>
struct GatedJob {
  DecodeGatedParams p;

  struct Operands {
    float gate, up;  // the biases
  };

  static __host__ __device__ int tiles_of(int64_t n) {
    return static_cast<int>((n + kPairs - 1) / kPairs);
  }
  __device__ int tiles() const { return tiles_of(p.n); }

  __device__ int64_t index(int tile, int pair) const {
    return static_cast<int64_t>(tile) * kPairs + pair;
  }

  __device__ const T* row(int tile, int pair, int side) const {
    const int64_t n = index(tile, pair);
    return n < p.n ? static_cast<const T*>(side ? p.up : p.gate) + n * p.in.k : nullptr;
  }

  __device__ Operands load(int tile, int pair, int) const {
    const int64_t n = index(tile, pair);
    Operands bias = {0.f, 0.f};
    if (n < p.n && p.b_gate) bias.gate = static_cast<float>(static_cast<const T*>(p.b_gate)[n]);
    if (n < p.n && p.b_up) bias.up = static_cast<float>(static_cast<const T*>(p.b_up)[n]);
    return bias;
  }

  __device__ void store(int tile, int pair, int token, float gate, float up,
                        const Operands& bias) const {
    const int64_t n = index(tile, pair);
    if (n >= p.n) return;
    static_cast<T*>(p.out)[token * p.n + n] =
        T(activate(gate + bias.gate, p.activation) * (up + bias.up));
  }
};

}  // namespace

void launch_decode_gated(const DecodeGatedParams& p, cudaStream_t stream) {
  if (p.in.tokens == 0) return;
  const int tiles = GatedJob<__half>::tiles_of(p.n);
  if (p.in.dtype == DType::kFloat16) {
    launch_stream_linear<__half>(p.in, GatedJob<__half>{p}, tiles, stream);
  } else {
    launch_stream_linear<__nv_bfloat16>(p.in, GatedJob<__nv_bfloat16>{p}, tiles, stream);
  }
}

}  // namespace torchtune_fused
