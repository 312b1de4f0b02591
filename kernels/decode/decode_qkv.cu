// q, k and v of the new tokens, rotated, k and v written straight into the cache.
//
// A pair is two rows of one head: those that RoPE rotates together.
#include "decode/head_norm.cuh"
#include "decode/stream_linear.cuh"

namespace torchtune_fused {
namespace {

template <typename T>
struct QkvJob {
  DecodeQkvParams p;

  static constexpr bool kLetsCacheBeRead = true;
  static constexpr bool kMergesParts = false;
  static constexpr bool kMayBeDeep = false;

  struct Operands {
    float bias_a, bias_b;
    float cos, sin;
    int slot;
  };

  // Where a pair lies: rows (elements of a head) a and b of `head` of matrix 0: q, 1: k, 2: v.
  struct Place {
    int matrix, head, a, b;
  };

  __host__ __device__ int pairs() const {
    return (p.heads + 2 * p.kv_heads) * (p.head_dim / 2);
  }

  __device__ Place locate(int pair) const {
    const int half = p.head_dim / 2;
    const int head = pair / half, i = pair % half;
    Place place;
    place.matrix = head < p.heads ? 0 : head < p.heads + p.kv_heads ? 1 : 2;
    place.head = head - (place.matrix > 0 ? p.heads : 0) - (place.matrix > 1 ? p.kv_heads : 0);
    if (p.rope.interleaved || place.matrix == 2) {
      place.a = 2 * i;
      place.b = place.a + 1;
    } else {
      place.a = i;
      place.b = i + half;
    }
    return place;
  }

  __device__ const T* row(int pair, int side) const {
    const Place at = locate(pair);
    const void* weight = at.matrix == 0 ? p.wq : at.matrix == 1 ? p.wk : p.wv;
    const int64_t n = static_cast<int64_t>(at.head) * p.head_dim + (side ? at.b : at.a);
    return static_cast<const T*>(weight) + n * p.in.k;
  }

  __device__ Operands load(int pair, int token) const {
    const Place at = locate(pair);
    Operands o = {0.f, 0.f, 1.f, 0.f, 0};
    const void* bias = at.matrix == 0 ? p.bq : at.matrix == 1 ? p.bk : p.bv;
    if (bias) {
      const T* of_head = static_cast<const T*>(bias) + at.head * p.head_dim;
      o.bias_a = static_cast<float>(of_head[at.a]);
      o.bias_b = static_cast<float>(of_head[at.b]);
    }
    o.slot = static_cast<int>(min(p.cache_pos[0], p.max_len)) + token % p.steps;
    if (p.rope.cos && !p.q_norm && at.matrix < 2) {
      const int64_t position = position_of(p, token);
      const int i = p.rope.interleaved ? at.a / 2 : at.a;
      o.cos = p.rope.cos[position * p.rope.cos_stride[0] + i * p.rope.cos_stride[1]];
      o.sin = p.rope.sin[position * p.rope.sin_stride[0] + i * p.rope.sin_stride[1]];
    }
    return o;
  }

  __device__ void store(int pair, int token, float a, float b, const Operands& o) const {
    const Place at = locate(pair);
    T* target = head_pointer<T>(p, at.matrix, at.head, token, o.slot);
    if (target == nullptr) return;
    a += o.bias_a;
    b += o.bias_b;
    target[at.a] = T(a * o.cos - b * o.sin);
    target[at.b] = T(b * o.cos + a * o.sin);
  }
};

template <typename T>
void launch(const DecodeQkvParams& p, cudaStream_t stream) {
  launch_stream_linear<T>(p.in, QkvJob<T>{p}, stream);
  if (p.q_norm) {
    const int heads = p.in.tokens * (p.heads + p.kv_heads);
    allow_shared_memory(head_norm_kernel<T>, 0);
    launch_chained(head_norm_kernel<T>, (heads + kHeadWarps - 1) / kHeadWarps, 32 * kHeadWarps, 0,
                   stream, p);
  }
  let_cache_be_read_ahead(stream);
}

}  // namespace

void launch_decode_qkv(const DecodeQkvParams& p, cudaStream_t stream) {
  if (p.in.tokens == 0) return;
  p.in.dtype == DType::kFloat16 ? launch<__half>(p, stream) : launch<__nv_bfloat16>(p, stream);
}

}  // namespace torchtune_fused
