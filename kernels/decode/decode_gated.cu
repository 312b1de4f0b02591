// activation(x gate^T) * (x up^T): a pair is one row of gate and the same row of up.
#include "common/activation.cuh"
#include "decode/stream_linear.cuh"

namespace torchtune_fused {
namespace {

template <typename T>
struct GatedJob {
  DecodeGatedParams p;

  struct Operands {
    float gate, up;  // the biases
  };

  // The down projection takes what this writes.
  int64_t next_k() const { return p.n; }
  __host__ __device__ int pairs() const { return static_cast<int>(p.n); }
  static constexpr bool kLetsCacheBeRead = false;
  static constexpr bool kMergesParts = false;
  static constexpr bool kMayBeDeep = true;

  __device__ const T* row(int n, int side) const {
    return static_cast<const T*>(side ? p.up : p.gate) + static_cast<int64_t>(n) * p.in.k;
  }

  __device__ Operands load(int n, int) const {
    Operands bias = {0.f, 0.f};
    if (p.b_gate) bias.gate = static_cast<float>(static_cast<const T*>(p.b_gate)[n]);
    if (p.b_up) bias.up = static_cast<float>(static_cast<const T*>(p.b_up)[n]);
    return bias;
  }

  __device__ void store(int n, int token, float gate, float up, const Operands& bias) const {
    with_activation(p.activation, [&](auto activation) {
      static_cast<T*>(p.out)[token * p.n + n] =
          T(activate<activation.value>(gate + bias.gate) * (up + bias.up));
    });
  }
};

}  // namespace

void launch_decode_gated(const DecodeGatedParams& p, cudaStream_t stream) {
  if (p.in.tokens == 0) return;
  if (p.in.dtype == DType::kFloat16) {
    launch_stream_linear<__half>(p.in, GatedJob<__half>{p}, stream);
  } else {
    launch_stream_linear<__nv_bfloat16>(p.in, GatedJob<__nv_bfloat16>{p}, stream);
  }
}

}  // namespace torchtune_fused
