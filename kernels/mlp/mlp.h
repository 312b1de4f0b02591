// The gated MLP: what the host hands to the kernels, and their launches.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/cuda_utils.h"
#include "rope/rope.h"

namespace torchtune_fused {

// hidden = activation(gate) * up; all of `size` elements, contiguous. hidden may be gate or up.
struct GatedActivationParams {
  const void* gate;
  const void* up;
  void* hidden;
  int64_t size;
  Activation activation;
  DType dtype;
};

// The gradients of gate and up from that of hidden. Each output may be one of the inputs.
struct GatedActivationBackwardParams {
  const void* grad;
  const void* gate;
  const void* up;
  void* hidden;  // computed again; null: not wanted
  void* grad_gate;
  void* grad_up;
  int64_t size;
  Activation activation;
  DType dtype;
};

// hidden = activation(x gate_weight^T + low[:, :rank_gate] low_gate^T) *
// (x up_weight^T + low[:, rank_gate:] low_up^T): the projections of a gated MLP, with or without
// low-rank adapters.
struct GatedLinearParams {
  const void* x;            // [rows, k]
  const void* gate_weight;  // [n, k]
  const void* up_weight;    // [n, k]
  const void* low;          // [rows, rank], or null: no adapters
  const void* low_gate;     // [n, rank_gate]
  const void* low_up;       // [n, rank - rank_gate]
  void* hidden;             // [rows, n]
  void* gate;               // [rows, n]: the projections before the activation
  void* up;                 // [rows, n]; both null: not wanted
  int rows, n, k, rank, rank_gate;
  Activation activation;
  DType dtype;
};

// grad_hidden = grad down + grad_low low_down, and from it what GatedActivationBackwardParams say.
struct GatedLinearBackwardParams {
  const void* grad;      // [rows, k]
  const void* down;      // [k, n]
  const void* grad_low;  // [rows, rank], or null: no adapter
  const void* low_down;  // [rank, n]
  const void* gate;      // [rows, n]
  const void* up;        // [rows, n]
  void* hidden;          // [rows, n]; null: not wanted
  void* grad_gate;       // [rows, n]
  void* grad_up;         // [rows, n]
  int rows, n, k, rank;
  Activation activation;
  DType dtype;
};

// Sums of products: outs[i] = the sum of its terms, first second^T, or first second with `across`,
// and of the addend, if there is one; then there is one sum only. With `rope`, the heads of all
// sums but the last are turned by the angles of their tokens.
constexpr int kMaxSums = 3, kMaxTerms = 6;
constexpr int kClusterTile = 256;  // rows and columns that a cluster of two blocks takes at a time

struct ProductTerm {
  const void* first;     // [rows, k]
  int64_t first_stride;  // elements from row to row
  const void* second;    // [n, k]; with `across` [k, n]
  int k;
};

struct GroupedProductParams {
  void* outs[kMaxSums];  // [rows, n] each
  int n[kMaxSums];
  ProductTerm terms[kMaxTerms];  // those of one output after those of another
  int term_ends[kMaxSums];       // how many terms there are up to and with those of an output
  const void* addend;            // [rows, n], or null
  RopeParams rope;               // cos is null: nothing is turned
  int sums, rows;
  bool across;
  DType dtype;
};

#ifdef TTF_HAS_SM90
// Hopper's way, which needs all pointers and rows to start at multiples of 16 bytes.
void launch_gated_linear_sm90(const GatedLinearParams& params, cudaStream_t stream);
void launch_gated_linear_backward_sm90(const GatedLinearBackwardParams& params,
                                       cudaStream_t stream);
void launch_grouped_product_sm90(const GroupedProductParams& params, cudaStream_t stream);
#endif

void launch_gated_activation(const GatedActivationParams& params, cudaStream_t stream);
void launch_gated_activation_backward(const GatedActivationBackwardParams& params,
                                      cudaStream_t stream);

}  // namespace torchtune_fused
