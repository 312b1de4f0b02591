// One decoding step: what the host hands to the kernels, and their launches.
//
// All matrices are row-major; a weight is [rows, k] as in torch.nn.Linear, and "token" means one
// row of activations (batch times new positions), at most kMaxTokens of them.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cuda_utils.h"

namespace torchtune_fused {

constexpr int kMaxTokens = 16;
constexpr int kMaxSplits = 8;       // of the keys of one token
constexpr int kAttendHeadDim = 64;  // the head dimension that decode_attend takes

// What attention of one token leaves for the output projection to merge: of each split of the keys,
// the sum of the values by probability, and what the probabilities were taken from and add up to.
struct AttentionParts {
  float* outs;            // [kv_heads, kMaxSplits, group, kAttendHeadDim]; null: no parts
  float2* stats;          // [kv_heads, kMaxSplits, group]: maximum (times log2 e), sum
  const int64_t* length;  // one element: slots filled
  int64_t max_len;
  // As launch.h says: the length and old slots may be read before the grid ahead ends.
  bool reads_ahead;
  int group;  // query heads of a key head
};

// The activations of a weight-streaming linear: x, normalised first if norm_weight is given.
struct TokensParams {
  const void* x;            // [tokens, k]
  AttentionParts parts;     // or, of one token, what x is merged from
  const void* norm_weight;  // [k], or null: no RMSNorm
  void* scratch;            // [tokens, k], where tokens_need_scratch() says so
  float eps;
  int tokens;
  int k;  // a multiple of 8
  DType dtype;
};

// Whether a kernel of its own normalises the tokens into `scratch` first: where a block can't keep
// them all, in fp16, or if not even the norm's weights find room.
bool tokens_need_scratch(const TokensParams& params);

// scratch[t] = RMSNorm(x[t]) * norm_weight
void launch_normalize_tokens(const TokensParams& params, cudaStream_t stream);

// out[t] = weight[ids[t]]
struct DecodeEmbedParams {
  const int64_t* ids;  // [tokens]
  const void* weight;  // [vocab, pieces of 16 bytes]
  void* out;           // [tokens, pieces]
  int64_t vocab, pieces;
  int tokens;
};

// out[t, n] = x[t] . weight[n] (+ bias[n]) (+ residual[t, n])
struct DecodeLinearParams {
  TokensParams in;
  const void* weight;    // [n, k]
  const void* bias;      // [n] or null
  const void* residual;  // [tokens, n] or null
  void* out;             // [tokens, n], of the dtype of x, or fp32
  int64_t n;
  bool fp32_out;
};

// out[t, n] = activation(x[t] . gate[n] + b_gate[n]) * (x[t] . up[n] + b_up[n])
struct DecodeGatedParams {
  TokensParams in;
  const void* gate;  // [n, k]
  const void* up;    // [n, k]
  const void* b_gate;
  const void* b_up;  // [n] or null
  void* out;         // [tokens, n]
  int64_t n;
  Activation activation;
};

// The rotation tables, and where each token stands. Tokens are ordered [batch, step].
struct DecodeRopeParams {
  const float* cos;  // [max_seq_len, head_dim / 2]; null: no rotation
  const float* sin;
  int64_t cos_stride[2];  // in elements
  int64_t sin_stride[2];
  const int64_t* input_pos;  // [batch or 1, steps]; null: the slot in the cache
  bool input_pos_batched;
  bool interleaved;
};

// q = rope(x wq + bq) and, into the cache at slots cache_pos..., k = rope(x wk + bk), v = x wv + bv
struct DecodeQkvParams {
  TokensParams in;
  const void *wq, *wk, *wv;  // [heads * head_dim, k], [kv_heads * head_dim, k] twice
  const void *bq, *bk, *bv;  // or null
  DecodeRopeParams rope;
  void* q;        // [batch, steps, heads, head_dim]
  void* k_cache;  // [>= batch, kv_heads, max_len, head_dim]
  void* v_cache;
  const int64_t* cache_pos;  // one element: the first slot to write
  int heads, kv_heads, head_dim, steps;
  int64_t max_len;
  // RMSNorm over each head of q and k, before or after the rotation; null: none
  const void *q_norm, *k_norm;  // [head_dim]
  float head_eps;
  bool norm_before_rope;
};

// Attention of one token over a cache of `*parts.length` slots, its own the last.
struct DecodeAttendParams {
  const void* q;  // [heads, kAttendHeadDim]
  const void* k;  // [kv_heads, max_len, kAttendHeadDim]
  const void* v;
  const unsigned char* mask;  // bool [max_len]: the slots to be seen; null: all that are filled
  AttentionParts parts;
  double scale;  // of the logits
  int kv_heads;
  DType dtype;
};

void launch_decode_embed(const DecodeEmbedParams& params, cudaStream_t stream);
void launch_decode_attend(const DecodeAttendParams& params, cudaStream_t stream);
void launch_decode_linear(const DecodeLinearParams& params, cudaStream_t stream);
void launch_decode_gated(const DecodeGatedParams& params, cudaStream_t stream);
void launch_decode_qkv(const DecodeQkvParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
