// Attention of many queries: checks on the tensors, and the choice among the kernels.
#include "attention/flash_attention.h"

#include <optional>
#include <tuple>

#include "common/launch.h"
#include "common/torch_utils.h"
#include "rope/rope_tensors.h"

namespace torchtune_fused {
namespace {

// What hides keys, as the ops are given it.
struct MaskTensors {
  const std::optional<Tensor>& bits;       // int32 [batch or 1, heads or 1, s, 2 * ceil(s_kv / 64)]
  const std::optional<Tensor>& kinds;      // uint8 [batch or 1, heads or 1, ceil(s / 64), ...]
  const std::optional<Tensor>& documents;  // int32 [2, batch, s]
  bool causal;
  std::optional<int64_t> window;
};

// The tensor itself, or a copy where its rows are not as the kernels read them: dense, and starting
// at multiples of 16 bytes.
Tensor with_aligned_rows(const Tensor& t) {
  bool aligned = starts_at_16_bytes(t) && t.stride(3) == 1;
  for (int i = 0; i < 3; ++i) aligned = aligned && (t.size(i) == 1 || t.stride(i) % 8 == 0);
  return aligned ? t : torch::stable::clone(dense(t));
}

// [b, h, s, d], in memory [b, s, h, d], so that heads are merged without a copy.
Tensor new_heads(const Tensor& like) {
  return torch::stable::transpose(
      allocate(like, {like.size(0), like.size(2), like.size(1), like.size(3)}), 1, 2);
}

void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
  TTF_CHECK(q.dim() == 4, "q must have shape [batch, heads, s, d], got ", shape_string(q));
  TTF_CHECK(q.size(3) % 8 == 0 && q.size(3) <= 256,
            "the head dimension must be a multiple of 8 up to 256, got ", q.size(3));
  check_shape(k, "k", {-1, -1, -1, q.size(3)});
  check_shape(v, "v", {k.size(0), k.size(1), k.size(2), q.size(3)});
  TTF_CHECK(k.size(0) >= q.size(0), "k must have at least ", q.size(0), " rows as q has, got ",
            k.size(0));
  TTF_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0,
            "the heads of q must be a multiple of those of k, got ", q.size(1), " and ", k.size(1));
  TTF_CHECK(q.size(2) < 1 << 30 && k.size(2) < 1 << 30, "q or k has too many tokens: ", q.size(2),
            " and ", k.size(2));
  for (const auto& [tensor, name] : {std::pair(&k, "k"), std::pair(&v, "v")}) {
    check_device(*tensor, name, q);
    check_dtype(*tensor, name, q.scalar_type());
  }
}

AttentionMask mask_params(const MaskTensors& mask, const Tensor& q, int64_t keys) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  AttentionMask p = {};
  p.causal = mask.causal;
  p.window = static_cast<int>(mask.window && *mask.window < keys ? *mask.window : 0);
  TTF_CHECK(mask.bits.has_value() == mask.kinds.has_value(),
            "mask must be bits and come with mask_kinds; see mask_tiles");
  if (mask.bits) {
    const int64_t columns = (keys + kMaskTile - 1) / kMaskTile;
    const int64_t rows = (queries + kMaskTile - 1) / kMaskTile;
    const Tensor &bits = *mask.bits, &kinds = *mask.kinds;
    check_device(bits, "mask", q);
    check_dtype(bits, "mask", ScalarType::Int);
    check_shape(bits, "mask", {-1, -1, queries, 2 * columns});
    check_contiguous(bits, "mask");
    TTF_CHECK((bits.size(0) == 1 || bits.size(0) == batch) &&
                  (bits.size(1) == 1 || bits.size(1) == heads),
              "mask must have shape [", batch, " or 1, ", heads, " or 1, ...], got ",
              shape_string(bits));
    check_device(kinds, "mask_kinds", q);
    check_dtype(kinds, "mask_kinds", ScalarType::Byte);
    check_shape(kinds, "mask_kinds", {bits.size(0), bits.size(1), rows, columns});
    check_contiguous(kinds, "mask_kinds");
    p.bits = static_cast<const uint32_t*>(bits.const_data_ptr());
    p.tile_kinds = static_cast<const unsigned char*>(kinds.const_data_ptr());
    p.bits_row_stride = static_cast<int>(2 * columns);
    p.kinds_row_stride = static_cast<int>(columns);
    p.bits_batch_stride = bits.size(0) == 1 ? 0 : bits.stride(0);
    p.bits_head_stride = bits.size(1) == 1 ? 0 : bits.stride(1);
    p.kinds_batch_stride = kinds.size(0) == 1 ? 0 : kinds.stride(0);
    p.kinds_head_stride = kinds.size(1) == 1 ? 0 : kinds.stride(1);
  }
  if (mask.documents) {
    const Tensor& documents = *mask.documents;
    TTF_CHECK(queries == keys, "documents need as many queries as keys, got ", queries, " and ",
              keys);
    check_device(documents, "documents", q);
    check_dtype(documents, "documents", ScalarType::Int);
    check_shape(documents, "documents", {2, batch, keys});
    check_contiguous(documents, "documents");
    p.document_start = static_cast<const int32_t*>(documents.const_data_ptr());
    p.document_end = p.document_start + batch * keys;
  }
  return p;
}

// q, k, v and out must have aligned rows.
FlashAttentionParams flash_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& out, const Tensor& lse, const MaskTensors& mask,
                                  double scale, std::optional<double> softcap) {
  FlashAttentionParams p = {};
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  copy_strides(q, p.q_stride);
  copy_strides(k, p.k_stride);
  copy_strides(v, p.v_stride);
  copy_strides(out, p.out_stride);
  p.mask = mask_params(mask, q, k.size(2));
  p.scale = scale;
  p.softcap = softcap.value_or(0.0);
  p.batch = static_cast<int>(q.size(0));
  p.heads = static_cast<int>(q.size(1));
  p.kv_heads = static_cast<int>(k.size(1));
  p.queries = static_cast<int>(q.size(2));
  p.keys = static_cast<int>(k.size(2));
  p.head_dim = static_cast<int>(q.size(3));
  p.dtype = half_dtype(q, "q");
  return p;
}

void launch_flash_forward(const FlashAttentionParams& p, cudaStream_t stream) {
#ifdef TTF_HAS_SM90
  if (runs_sm90_code() && flash_forward_sm90_takes(p)) return launch_flash_forward_sm90(p, stream);
#endif
  launch_flash_forward_sm80(p, stream);
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                   const int64_t* length, const MaskTensors& mask, double scale,
                                   std::optional<double> softcap) {
  check_qkv(q_, k_, v_);
  const LaunchContext context(q_);
  const Tensor q = with_aligned_rows(q_), k = with_aligned_rows(k_), v = with_aligned_rows(v_);
  const Tensor out = new_heads(q);
  const Tensor lse = allocate(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  FlashAttentionParams p = flash_params(q, k, v, out, lse, mask, scale, softcap);
  p.length = length;
  if (q.numel()) launch_flash_forward(p, context.stream());
  return {out, lse};
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& mask,
                                     const std::optional<Tensor>& mask_kinds,
                                     const std::optional<Tensor>& documents, bool causal,
                                     double scale, std::optional<int64_t> window,
                                     std::optional<double> softcap) {
  return forward(q, k, v, nullptr, {mask, mask_kinds, documents, causal, window}, scale, softcap);
}

Tensor attention_prefill(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                         const Tensor& length, const std::optional<Tensor>& mask,
                         const std::optional<Tensor>& mask_kinds, double scale,
                         std::optional<int64_t> window) {
  return std::get<0>(forward(q, k_cache, v_cache, cache_length(length, q),
                             {mask, mask_kinds, std::nullopt, !mask, window}, scale, std::nullopt));
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& out_,
    const Tensor& lse_, const std::optional<Tensor>& mask, const std::optional<Tensor>& mask_kinds,
    const std::optional<Tensor>& documents, bool causal, double scale,
    std::optional<int64_t> window, std::optional<double> softcap, bool deterministic,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    const std::optional<Tensor>& input_pos, bool interleaved) {
  check_qkv(q_, k_, v_);
  TTF_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  for (const auto& [tensor, name] : {std::pair(&grad_, "grad"), std::pair(&out_, "out")}) {
    check_device(*tensor, name, q_);
    check_dtype(*tensor, name, q_.scalar_type());
    check_shape(*tensor, name, {q_.size(0), q_.size(1), q_.size(2), q_.size(3)});
  }
  check_device(lse_, "lse", q_);
  check_dtype(lse_, "lse", ScalarType::Float);
  check_shape(lse_, "lse", {q_.size(0), q_.size(1), q_.size(2)});
  const LaunchContext context(q_);
  const Tensor q = with_aligned_rows(q_), k = with_aligned_rows(k_), v = with_aligned_rows(v_);
  const Tensor grad = with_aligned_rows(grad_), out = with_aligned_rows(out_);
  const Tensor lse = dense(lse_);
  const Tensor grad_q = new_heads(q), grad_k = new_heads(k), grad_v = new_heads(v);

  FlashAttentionBackwardParams p = {};
  p.forward = flash_params(q, k, v, out, lse, {mask, mask_kinds, documents, causal, window}, scale,
                           softcap);
  p.grad_out = grad.const_data_ptr();
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  copy_strides(grad, p.grad_out_stride);
  copy_strides(grad_q, p.grad_q_stride);
  copy_strides(grad_k, p.grad_k_stride);
  copy_strides(grad_v, p.grad_v_stride);
  p.deterministic = deterministic;
  const std::optional<Tensor> positions = input_pos ? std::optional(dense(*input_pos)) : input_pos;
  if (cos) {
    Tensor q_heads = torch::stable::transpose(grad_q, 1, 2);
    Tensor k_heads = torch::stable::transpose(grad_k, 1, 2);
    p.rope = rope_in_place(q_heads, k_heads, *cos, *sin, positions, interleaved, true);
  }
  if (q.numel()) {
    const int64_t bytes = flash_backward_workspace(p);
    const Tensor workspace = allocate(q, {bytes}, ScalarType::Byte);
    launch_flash_backward(p, workspace.mutable_data_ptr(), context.stream());
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace torchtune_fused
