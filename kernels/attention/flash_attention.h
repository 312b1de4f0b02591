// Attention of many queries (prefill and training): what the host hands to the kernels, and their
// launches.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"
#include "rope/rope.h"

namespace torchtune_fused {

// Granularity of AttentionMask::tile_kinds, in queries and in keys.
constexpr int kMaskTile = 64;
enum MaskTileKind : unsigned char { kTileEmpty = 0, kTileFull = 1, kTilePartial = 2 };

// Which keys a query sees: those that pass every part that is present.
//
// Query i stands at key i + offset, offset = keys - queries, so that the last query stands at the
// last key. All pointers are to device memory, null where the part is absent.
struct AttentionMask {
  bool causal;  // key j is seen if j <= i + offset
  int window;   // key j is seen if i + offset - j < window; 0: all

  // Packed documents, queries == keys: key j is seen if start[i] <= j < end[i]. Both are
  // [batch, keys] and never decrease along the keys; key j is thus seen by queries start[j] to end[j].
  const int32_t* document_start;
  const int32_t* document_end;

  // Any other mask: bit j % 32 of bits[batch][head][i][j / 32] says whether key j is seen, and
  // tile_kinds[batch][head][i / 64][j / 64] sums up each tile of 64 x 64. Bits and tiles beyond the
  // queries and keys are zero and don't count in the kind.
  const unsigned char* tile_kinds;
  int64_t kinds_batch_stride, kinds_head_stride;  // 0 where one mask serves all
  int kinds_row_stride;                           // ceil(keys / 64)
  const uint32_t* bits;
  int64_t bits_batch_stride, bits_head_stride;
  int bits_row_stride;  // in words: 2 * ceil(keys / 64)
};

struct FlashAttentionParams {
  const void* q;         // [batch, heads, queries, head_dim], unit last stride
  int64_t q_stride[3];   // in elements; every row starts at a multiple of 16 bytes
  const void* k;         // [batch, kv_heads, keys, head_dim]; head h reads h / (heads / kv_heads)
  int64_t k_stride[3];
  const void* v;
  int64_t v_stride[3];
  void* out;             // as q
  int64_t out_stride[3];
  float* lse;            // [batch, heads, queries]: ln(sum(exp(score))), 0 where no key is seen
  AttentionMask mask;
  const int64_t* length; // on the device: keys that are filled, at most `keys`; null: all are.
                         // Slots at and beyond it are never read (they may hold NaN); offset is then
                         // *length - queries
  double scale;          // of the scores
  double softcap;        // score = softcap * tanh(score / softcap), after the scale; 0: none
  int batch, heads, kv_heads, queries, keys, head_dim;
  DType dtype;           // kFloat16 or kBFloat16
};

struct FlashAttentionBackwardParams {
  FlashAttentionParams forward;  // with out and lse as the forward pass left them; no length
  const void* grad_out;          // as out
  int64_t grad_out_stride[3];
  void* grad_q;                  // as q
  int64_t grad_q_stride[3];
  void* grad_k;                  // as k: summed over the heads that read a key head
  int64_t grad_k_stride[3];
  void* grad_v;
  int64_t grad_v_stride[3];
  RopeParams rope;               // turns grad_q and grad_k, in place, to the gradients of what q and
                                 // k were before their rotation; cos is null if they are none
  bool deterministic;            // the same bits in every run
};

// Ampere's way (cp.async, mma): fp16 or bf16, head_dim a multiple of 8 up to 256, any of 8.0 to 9.0.
void launch_flash_forward_sm80(const FlashAttentionParams& params, cudaStream_t stream);

// How many bytes of workspace (16-byte aligned, uninitialised) the backward launch needs.
int64_t flash_backward_workspace(const FlashAttentionBackwardParams& params);
// By Hopper's kernel where it takes the case, else by Ampere's.
void launch_flash_backward(const FlashAttentionBackwardParams& params, void* workspace,
                           cudaStream_t stream);

#ifdef TTF_HAS_SM90
// Hopper's way (TMA, wgmma): whether it takes the case, and its launch.
bool flash_forward_sm90_takes(const FlashAttentionParams& params);
void launch_flash_forward_sm90(const FlashAttentionParams& params, cudaStream_t stream);
#endif

}  // namespace torchtune_fused
