// Attention: checks on the tensors, and the launches.
#include "attention/attention.h"

#include <optional>

#include "common/torch_utils.h"

namespace torchtune_fused {
namespace {

void check_unit_stride(const Tensor& t, const char* name) {
  TTF_CHECK(t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1, name,
            " must have a last dimension of stride 1, got ", t.stride(t.dim() - 1), "; pass ", name,
            ".contiguous()");
}

}  // namespace

// The op's other checks are those of its Python wrapper; these are what memory safety needs.
Tensor attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& length, const std::optional<Tensor>& mask, double scale,
                        std::optional<int64_t> window) {
  DecodeAttentionParams p = {};
  p.dtype = floating_dtype(q, "q");
  TTF_CHECK(q.dim() == 4, "q must have shape [batch, heads, s, d], got ", shape_string(q));
  const int64_t batch = q.size(0), heads = q.size(1), steps = q.size(2), head_dim = q.size(3);
  check_shape(k_cache, "k_cache", {-1, -1, -1, head_dim});
  const int64_t rows = k_cache.size(0), kv_heads = k_cache.size(1), max_len = k_cache.size(2);
  check_shape(v_cache, "v_cache", {rows, kv_heads, max_len, head_dim});
  TTF_CHECK(rows >= batch, "k_cache must have at least ", batch, " rows as q has, got ", rows);
  TTF_CHECK(kv_heads > 0 && heads % kv_heads == 0, "the heads of q must be a multiple of those of ",
            "k_cache, got ", heads, " and ", kv_heads);
  for (const auto& [tensor, name] :
       {std::pair(&q, "q"), std::pair(&k_cache, "k_cache"), std::pair(&v_cache, "v_cache")}) {
    check_device(*tensor, name, q);
    check_dtype(*tensor, name, q.scalar_type());
    check_unit_stride(*tensor, name);
  }
  TTF_CHECK(max_len < 1 << 27 && k_cache.stride(2) < 1 << 24 && v_cache.stride(2) < 1 << 24,
            "k_cache has too many slots, or too far apart: ", max_len, " slots of stride ",
            k_cache.stride(2));
  if (mask) {
    check_device(*mask, "mask", q);
    check_dtype(*mask, "mask", ScalarType::Bool);
    check_shape(*mask, "mask", {-1, -1, steps, max_len});
    TTF_CHECK((mask->size(0) == batch || mask->size(0) == 1) &&
                  (mask->size(1) == heads || mask->size(1) == 1),
              "mask must have shape [", batch, " or 1, ", heads, " or 1, ", steps, ", ", max_len,
              "], got ", shape_string(*mask));
  }

  const LaunchContext context(q);
  // [b, s, h, d] in memory, so that the heads are merged without a copy.
  Tensor out = torch::stable::transpose(allocate(q, {batch, steps, heads, head_dim}), 1, 2);
  if (q.numel() == 0) return out;
  const Tensor dense_mask = mask ? mask->stride(3) == 1 ? *mask : dense(*mask) : q;

  p.q = q.const_data_ptr();
  p.k = k_cache.const_data_ptr();
  p.v = v_cache.const_data_ptr();
  p.out = out.mutable_data_ptr();
  copy_strides(q, p.q_stride);
  copy_strides(k_cache, p.k_stride);
  copy_strides(v_cache, p.v_stride);
  copy_strides(out, p.out_stride);
  p.length = cache_length(length, q);
  if (mask) {
    p.mask = static_cast<const unsigned char*>(dense_mask.const_data_ptr());
    copy_strides(dense_mask, p.mask_stride);
    if (dense_mask.size(0) == 1) p.mask_stride[0] = 0;
    if (dense_mask.size(1) == 1) p.mask_stride[1] = 0;
  }
  p.scale = scale;
  p.window = static_cast<int>(window && *window < max_len ? *window : 0);
  p.batch = static_cast<int>(batch);
  p.heads = static_cast<int>(heads);
  p.kv_heads = static_cast<int>(kv_heads);
  p.steps = static_cast<int>(steps);
  p.head_dim = static_cast<int>(head_dim);
  p.max_len = max_len;
  if (!decode_attention_is_fast(p)) {
    launch_decode_attention_any(p, context.stream());
    return out;
  }
  const int64_t floats = plan_decode_attention(p);
  const Tensor workspace = allocate(q, {floats}, ScalarType::Float);
  if (floats) use_workspace(p, static_cast<float*>(workspace.mutable_data_ptr()));
  launch_decode_attention(p, context.stream());
  return out;
}

}  // namespace torchtune_fused
