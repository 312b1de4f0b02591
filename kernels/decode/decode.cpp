// The ops of one decoding step: checks on the tensors, and the launches.
#include "decode/decode.h"

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "common/launch.h"
#include "common/torch_utils.h"

namespace torchtune_fused {
namespace {

const void* data_or_null(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr() : nullptr;
}

// Like x in device and dtype, of the shape, and aligned for 16-byte loads.
void check_operand(const Tensor& t, const char* name, const Tensor& x,
                   std::initializer_list<int64_t> shape) {
  check_like(t, name, x, shape);
  check_aligned(t, name);
}

void check_operand(const std::optional<Tensor>& t, const char* name, const Tensor& x,
                   std::initializer_list<int64_t> shape) {
  if (t) check_operand(*t, name, x, shape);
}

// x [..., k] as the tokens of a linear; `scratch` lives as long as the launch needs it.
TokensParams tokens_of(const Tensor& x, const std::optional<Tensor>& norm_weight, double eps,
                       Tensor& scratch) {
  TokensParams p = {};
  p.dtype = half_dtype(x, "x");
  TTF_CHECK(x.dim() >= 1, "x must have at least one dimension, got a scalar");
  const int64_t k = x.size(x.dim() - 1);
  TTF_CHECK(k > 0 && k % 8 == 0, "the last dimension of x must be a multiple of 8, got ", k);
  const int64_t tokens = x.numel() / k;
  TTF_CHECK(tokens <= kMaxTokens, "decoding takes at most ", kMaxTokens, " tokens a step, got ",
            tokens, " (x of shape ", shape_string(x), ")");
  check_contiguous(x, "x");
  check_aligned(x, "x");
  check_operand(norm_weight, "norm_weight", x, {k});
  p.x = x.const_data_ptr();
  p.norm_weight = data_or_null(norm_weight);
  p.eps = static_cast<float>(eps);
  p.tokens = static_cast<int>(tokens);
  p.k = static_cast<int>(k);
  if (tokens_need_scratch(p)) {
    scratch = allocate(x, x.sizes());
    p.scratch = scratch.mutable_data_ptr();
  }
  return p;
}

std::vector<int64_t> with_last(const Tensor& x, int64_t n) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  return shape;
}

}  // namespace

void decode_embed_(Tensor out, const Tensor& ids, const Tensor& weight) {
  const LaunchContext context(weight);
  half_dtype(weight, "weight");
  check_operand(weight, "weight", weight, {-1, -1});
  const int64_t dim = weight.size(1);
  TTF_CHECK(dim % 8 == 0, "the rows of weight must be a multiple of 8, got ", dim);
  check_device(ids, "ids", weight);
  check_dtype(ids, "ids", ScalarType::Long);
  check_contiguous(ids, "ids");
  const int64_t tokens = ids.numel();
  TTF_CHECK(tokens <= kMaxTokens, "decoding takes at most ", kMaxTokens, " tokens a step, got ",
            tokens);
  check_operand(out, "out", weight, {tokens, dim});
  launch_decode_embed({.ids = static_cast<const int64_t*>(ids.const_data_ptr()),
                       .weight = weight.const_data_ptr(),
                       .out = out.mutable_data_ptr(),
                       .vocab = weight.size(0),
                       .pieces = dim / 8,
                       .tokens = static_cast<int>(tokens)},
                      context.stream());
}

Tensor decode_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual,
                     const std::optional<Tensor>& norm_weight, double eps, bool fp32_out) {
  const LaunchContext context(x);
  Tensor scratch = x;
  DecodeLinearParams p = {};
  p.in = tokens_of(x, norm_weight, eps, scratch);
  check_operand(weight, "weight", x, {-1, p.in.k});
  p.n = weight.size(0);
  check_operand(bias, "bias", x, {p.n});
  const std::vector<int64_t> shape = with_last(x, p.n);
  if (residual) {
    check_device(*residual, "residual", x);
    check_dtype(*residual, "residual", x.scalar_type());
    check_contiguous(*residual, "residual");
    TTF_CHECK(residual->numel() == p.in.tokens * p.n && residual->size(residual->dim() - 1) == p.n,
              "residual must have the shape of the output, ", p.in.tokens, " tokens of ", p.n,
              ", got ", shape_string(*residual));
  }
  Tensor out = allocate(x, shape, fp32_out ? ScalarType::Float : x.scalar_type());
  p.weight = weight.const_data_ptr();
  p.bias = data_or_null(bias);
  p.residual = data_or_null(residual);
  p.out = out.mutable_data_ptr();
  p.fp32_out = fp32_out;
  if (out.numel()) launch_decode_linear(p, context.stream());
  return out;
}

Tensor decode_gated(const Tensor& x, const Tensor& w_gate, const Tensor& w_up,
                    const std::optional<Tensor>& b_gate, const std::optional<Tensor>& b_up,
                    const std::optional<Tensor>& norm_weight, double eps, std::string activation) {
  const LaunchContext context(x);
  Tensor scratch = x;
  DecodeGatedParams p = {};
  p.in = tokens_of(x, norm_weight, eps, scratch);
  p.activation = activation_of(activation);
  check_operand(w_gate, "w_gate", x, {-1, p.in.k});
  p.n = w_gate.size(0);
  check_operand(w_up, "w_up", x, {p.n, p.in.k});
  check_operand(b_gate, "b_gate", x, {p.n});
  check_operand(b_up, "b_up", x, {p.n});
  Tensor out = allocate(x, with_last(x, p.n));
  p.gate = w_gate.const_data_ptr();
  p.up = w_up.const_data_ptr();
  p.b_gate = data_or_null(b_gate);
  p.b_up = data_or_null(b_up);
  p.out = out.mutable_data_ptr();
  if (out.numel()) launch_decode_gated(p, context.stream());
  return out;
}

Tensor decode_qkv(const Tensor& x, const Tensor& wq, const Tensor& wk, const Tensor& wv,
                  const std::optional<Tensor>& bq, const std::optional<Tensor>& bk,
                  const std::optional<Tensor>& bv, const std::optional<Tensor>& norm_weight,
                  double eps, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                  const std::optional<Tensor>& input_pos, bool interleaved,
                  const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                  double head_eps, bool norm_before_rope, Tensor k_cache, Tensor v_cache,
                  const Tensor& cache_pos) {
  const LaunchContext context(x);
  Tensor scratch = x;
  DecodeQkvParams p = {};
  TTF_CHECK(x.dim() == 3, "x must have shape [batch, s, k], got ", shape_string(x));
  p.in = tokens_of(x, norm_weight, eps, scratch);
  const int64_t batch = x.size(0), steps = x.size(1);
  check_operand(k_cache, "k_cache", x, {-1, -1, -1, -1});
  const int64_t rows = k_cache.size(0), kv_heads = k_cache.size(1), head_dim = k_cache.size(3);
  p.max_len = k_cache.size(2);
  check_operand(v_cache, "v_cache", x, {rows, kv_heads, p.max_len, head_dim});
  TTF_CHECK(rows >= batch, "k_cache must have at least ", batch, " rows as x has, got ", rows);
  TTF_CHECK(head_dim > 0 && head_dim % 16 == 0 && head_dim <= 256,
            "the head dimension must be a multiple of 16 up to 256, got ", head_dim);
  check_operand(wq, "wq", x, {-1, p.in.k});
  TTF_CHECK(wq.size(0) % head_dim == 0, "wq must have whole heads of ", head_dim, " rows, got ",
            wq.size(0));
  check_operand(wk, "wk", x, {kv_heads * head_dim, p.in.k});
  check_operand(wv, "wv", x, {kv_heads * head_dim, p.in.k});
  check_operand(bq, "bq", x, {wq.size(0)});
  check_operand(bk, "bk", x, {kv_heads * head_dim});
  check_operand(bv, "bv", x, {kv_heads * head_dim});
  check_device(cache_pos, "cache_pos", x);
  check_dtype(cache_pos, "cache_pos", ScalarType::Long);
  TTF_CHECK(cache_pos.numel() >= 1, "cache_pos must have at least one element");
  TTF_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  TTF_CHECK(q_norm.has_value() == k_norm.has_value(), "q_norm and k_norm must be given together");
  check_operand(q_norm, "q_norm", x, {head_dim});
  check_operand(k_norm, "k_norm", x, {head_dim});
  if (cos) {
    for (const auto& [table, name] : {std::pair(&*cos, "cos"), std::pair(&*sin, "sin")}) {
      check_device(*table, name, x);
      check_dtype(*table, name, ScalarType::Float);
      check_shape(*table, name, {-1, head_dim / 2});
    }
    p.rope.cos = static_cast<const float*>(cos->const_data_ptr());
    p.rope.sin = static_cast<const float*>(sin->const_data_ptr());
    copy_strides(*cos, p.rope.cos_stride);
    copy_strides(*sin, p.rope.sin_stride);
  }
  if (input_pos) {
    check_device(*input_pos, "input_pos", x);
    check_dtype(*input_pos, "input_pos", ScalarType::Long);
    check_contiguous(*input_pos, "input_pos");
    TTF_CHECK(input_pos->numel() == steps || input_pos->numel() == batch * steps,
              "input_pos must have ", steps, " or ", batch * steps, " elements, got ",
              input_pos->numel());
    p.rope.input_pos = static_cast<const int64_t*>(input_pos->const_data_ptr());
    p.rope.input_pos_batched = input_pos->numel() == batch * steps;
  }
  p.rope.interleaved = interleaved;
  p.heads = static_cast<int>(wq.size(0) / head_dim);
  p.kv_heads = static_cast<int>(kv_heads);
  p.head_dim = static_cast<int>(head_dim);
  p.steps = static_cast<int>(steps);
  p.wq = wq.const_data_ptr();
  p.wk = wk.const_data_ptr();
  p.wv = wv.const_data_ptr();
  p.bq = data_or_null(bq);
  p.bk = data_or_null(bk);
  p.bv = data_or_null(bv);
  p.q_norm = data_or_null(q_norm);
  p.k_norm = data_or_null(k_norm);
  p.head_eps = static_cast<float>(head_eps);
  p.norm_before_rope = norm_before_rope;
  p.cache_pos = static_cast<const int64_t*>(cache_pos.const_data_ptr());
  Tensor q = allocate(x, {batch, steps, p.heads, head_dim});
  p.q = q.mutable_data_ptr();
  p.k_cache = k_cache.mutable_data_ptr();
  p.v_cache = v_cache.mutable_data_ptr();
  if (p.in.tokens) launch_decode_qkv(p, context.stream());
  return q;
}

Tensor decode_attend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& length, const std::optional<Tensor>& mask, const Tensor& weight,
                     const std::optional<Tensor>& bias, const Tensor& residual) {
  const LaunchContext context(q);
  DecodeAttendParams p = {};
  p.dtype = half_dtype(q, "q");
  constexpr int64_t head_dim = kAttendHeadDim;
  check_operand(q, "q", q, {1, -1, 1, head_dim});
  const int64_t heads = q.size(1);
  check_operand(k_cache, "k_cache", q, {-1, -1, -1, head_dim});
  const int64_t kv_heads = k_cache.size(1), max_len = k_cache.size(2);
  check_operand(v_cache, "v_cache", q, {k_cache.size(0), kv_heads, max_len, head_dim});
  TTF_CHECK(
      k_cache.numel() > 0 && heads % kv_heads == 0 && heads <= 8 * kv_heads && max_len < 1 << 20,
      "q must have 1 to 8 heads for each of the caches', of less than 2^20 slots, got ",
      shape_string(q), " and caches of ", shape_string(k_cache));
  if (mask) {
    check_device(*mask, "mask", q);
    check_dtype(*mask, "mask", ScalarType::Bool);
    check_shape(*mask, "mask", {1, 1, max_len});
    check_contiguous(*mask, "mask");
    p.mask = static_cast<const unsigned char*>(mask->const_data_ptr());
  }
  DecodeLinearParams linear = {};
  linear.n = weight.size(0);
  check_operand(weight, "weight", q, {linear.n, heads * head_dim});
  check_operand(bias, "bias", q, {linear.n});
  check_operand(residual, "residual", q, {1, 1, linear.n});

  p.parts.group = static_cast<int>(heads / kv_heads);
  p.parts.length = cache_length(length, q);
  p.parts.max_len = max_len;
  p.parts.reads_ahead = may_read_cache_ahead(context.stream());
  const int64_t rows = heads * kMaxSplits;
  Tensor workspace = allocate(q, {rows * (head_dim + 2)}, ScalarType::Float);
  p.parts.outs = static_cast<float*>(workspace.mutable_data_ptr());
  p.parts.stats = reinterpret_cast<float2*>(p.parts.outs + rows * head_dim);
  p.q = q.const_data_ptr();
  p.k = k_cache.const_data_ptr();
  p.v = v_cache.const_data_ptr();
  p.scale = 1 / std::sqrt(static_cast<double>(head_dim));
  p.kv_heads = static_cast<int>(kv_heads);

  Tensor out = allocate(q, {1, 1, linear.n});
  linear.in.parts = p.parts;
  linear.in.tokens = 1;
  linear.in.k = static_cast<int>(heads * head_dim);
  linear.in.dtype = p.dtype;
  linear.in.x = p.q;  // some address of the tokens' memory, for loads of nothing
  linear.weight = weight.const_data_ptr();
  linear.bias = data_or_null(bias);
  linear.residual = residual.const_data_ptr();
  linear.out = out.mutable_data_ptr();
  launch_decode_attend(p, context.stream());
  launch_decode_linear(linear, context.stream());
  return out;
}

}  // namespace torchtune_fused
