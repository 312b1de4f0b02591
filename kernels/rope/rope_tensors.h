// Rotations as other families of ops are given them: as tensors.
#pragma once

#include <optional>

#include "common/torch_utils.h"
#include "rope/rope.h"

namespace torchtune_fused {

// The angles of b rows of s tokens, for heads of d channels; the heads are left to name. input_pos
// must be contiguous.
RopeParams rope_angles(const Tensor& like, int64_t b, int64_t s, int64_t d, const Tensor& cos,
                       const Tensor& sin, const std::optional<Tensor>& input_pos,
                       bool interleaved);

// Turns q [b, s, heads, d] and k [b, s, kv_heads, d], whose last dimensions are dense, where they
// are. input_pos must be contiguous. plan_rope is left to do.
RopeParams rope_in_place(Tensor& q, Tensor& k, const Tensor& cos, const Tensor& sin,
                         const std::optional<Tensor>& input_pos, bool interleaved, bool inverse);

}  // namespace torchtune_fused
