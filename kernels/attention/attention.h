// Attention: what the host hands to the kernels, and their launches.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

// Attention of the last `steps` positions over a cache of `*length` filled slots.
//
// Query head h reads key head h / (heads / kv_heads). Without a mask, the query at step i stands
// at slot length - steps + i and sees the slots up to its own. Strides are in elements.
struct DecodeAttentionParams {
  const void* q;  // [batch, heads, steps, head_dim], unit last stride
  int64_t q_stride[3];
  const void* k;  // [batch, kv_heads, max_len, head_dim], unit last stride
  int64_t k_stride[3];
  const void* v;
  int64_t v_stride[3];
  void* out;  // as q
  int64_t out_stride[3];
  const int64_t* length;      // one element, on the device
  const unsigned char* mask;  // bool [batch, heads, steps, max_len], unit last stride; or null
  int64_t mask_stride[3];     // 0 where one mask serves the whole batch, or all heads
  double scale;               // of the logits
  int window;                 // slots that a query sees, itself included; 0: all
  int batch, heads, kv_heads, steps, head_dim;
  int64_t max_len;
  DType dtype;
  bool reads_ahead;  // set by the launch: old slots may be read before the grid ahead ends
  // Filled in by plan_decode_attention:
  int splits;            // blocks that share the keys of one group of query rows
  int inbox_bytes;       // of a block's inbox, if the splits form a cluster (or are one); else 0
  float* partial_out;    // [batch * kv_heads * row tiles, splits, 16, head_dim]
  unsigned* arrivals;    // [batch * kv_heads * row tiles]: zeros, as each launch leaves them
  float2* partial_stat;  // [batch * kv_heads * row tiles, splits, 16]: (maximum, sum)
};

// Whether the fast kernels below take the case: fp16 or bf16, a head dimension they are
// instantiated for, and rows that start at multiples of 16 bytes. launch_decode_attention_any
// takes all others.
bool decode_attention_is_fast(const DecodeAttentionParams& params);

void launch_decode_attention_any(const DecodeAttentionParams& params, cudaStream_t stream);

// Chooses the number of splits, and returns how many floats of workspace the launch needs.
int64_t plan_decode_attention(DecodeAttentionParams& params);

// Points the partial results into a workspace of that size, 16-byte aligned; null if it is zero.
void use_workspace(DecodeAttentionParams& params, float* workspace);

void launch_decode_attention(const DecodeAttentionParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
