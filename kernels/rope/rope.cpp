// Queries and keys normalised and rotated: checks on the tensors, and the launches.
#include "rope/rope_tensors.h"

#include <optional>
#include <string>
#include <tuple>

#include "common/column_sum.h"
#include "common/torch_utils.h"

namespace torchtune_fused {

RopeParams rope_angles(const Tensor& like, int64_t b, int64_t s, int64_t d, const Tensor& cos,
                       const Tensor& sin, const std::optional<Tensor>& input_pos,
                       bool interleaved) {
  check_shape(cos, "cos", {-1, d / 2});
  check_shape(sin, "sin", {cos.size(0), d / 2});
  check_device(cos, "cos", like);
  check_device(sin, "sin", like);
  check_dtype(sin, "sin", cos.scalar_type());
  TTF_CHECK(b * s <= INT32_MAX, "x must have fewer than 2^31 tokens, got ", b * s);
  RopeParams p = {.of = {},
                  .cos = cos.const_data_ptr(),
                  .sin = sin.const_data_ptr(),
                  .cos_stride = {cos.stride(0), cos.stride(1)},
                  .sin_stride = {sin.stride(0), sin.stride(1)},
                  .max_len = cos.size(0),
                  .interleaved = interleaved,
                  .tokens = b * s,
                  .steps = static_cast<int>(s),
                  .head_dim = static_cast<int>(d),
                  .dtype = floating_dtype(like, "x"),
                  .table_dtype = floating_dtype(cos, "cos")};
  if (!input_pos) {
    TTF_CHECK(s <= cos.size(0), "cos must have a row for each of ", s, " tokens, got ",
              cos.size(0));
    return p;
  }
  check_device(*input_pos, "input_pos", like);
  check_contiguous(*input_pos, "input_pos");
  const ScalarType type = input_pos->scalar_type();
  TTF_CHECK(type == ScalarType::Int || type == ScalarType::Long,
            "input_pos must be int32 or int64, got ", torch::headeronly::toString(type));
  TTF_CHECK(input_pos->numel() == s || input_pos->numel() == b * s, "input_pos must have ", s,
            " or ", b * s, " elements, got ", input_pos->numel());
  p.input_pos = input_pos->const_data_ptr();
  p.input_pos_int32 = type == ScalarType::Int;
  p.input_pos_batched = input_pos->numel() != s;
  return p;
}

namespace {

// `x` [b, s, heads, d] as the kernels read it: with a dense last dimension.
Tensor dense_heads(const Tensor& x) { return x.stride(3) == 1 ? x : dense(x); }

// All but the heads: sizes, tables and positions, with x as the first of the heads.
RopeParams params_of(const Tensor& x, const Tensor& cos, const Tensor& sin,
                     const std::optional<Tensor>& input_pos, bool interleaved) {
  TTF_CHECK(x.dim() == 4 && x.size(3) % 2 == 0 && x.size(3) <= kRopeMaxHeadDim,
            "x must have shape [b, s, heads, d], d even and at most ", kRopeMaxHeadDim, ", got ",
            shape_string(x));
  return rope_angles(x, x.size(0), x.size(1), x.size(3), cos, sin, input_pos, interleaved);
}

// Heads that go with `first`, the other ones of the same tokens, and their output [b, s, heads, d].
RopeHeads heads_of(const Tensor& x, const char* name, const Tensor& first, Tensor& out) {
  check_device(x, name, first);
  check_dtype(x, name, first.scalar_type());
  check_shape(x, name, {first.size(0), first.size(1), -1, first.size(3)});
  RopeHeads heads = {
      .x = x.const_data_ptr(), .out = out.mutable_data_ptr(), .heads = static_cast<int>(x.size(2))};
  copy_strides(x, heads.stride);
  copy_strides(out, heads.out_stride);
  return heads;
}

// The same into a cache [at least b, heads, slots, d].
RopeHeads cached_heads_of(const Tensor& x, const char* name, const Tensor& first, Tensor& cache,
                          const char* cache_name) {
  check_device(cache, cache_name, first);
  check_dtype(cache, cache_name, first.scalar_type());
  check_shape(cache, cache_name, {-1, x.size(2), -1, x.size(3)});
  TTF_CHECK(cache.size(0) >= x.size(0) && cache.stride(3) == 1, cache_name, " must have at least ",
            x.size(0), " rows and a dense last dimension, got ", shape_string(cache));
  Tensor out = torch::stable::transpose(cache, 1, 2);
  RopeHeads heads = heads_of(x, name, first, out);
  heads.cached = true;
  return heads;
}

void add_norm(RopeHeads& heads, const Tensor& norm, const char* name, const Tensor& x) {
  check_device(norm, name, x);
  check_shape(norm, name, {x.size(3)});
  check_contiguous(norm, name);
  heads.norm = norm.const_data_ptr();
  heads.norm_dtype = floating_dtype(norm, name);
}

void add_grad(RopeHeads& heads, const Tensor& grad, const char* name, const Tensor& x) {
  check_device(grad, name, x);
  check_dtype(grad, name, x.scalar_type());
  check_shape(grad, name, {x.size(0), x.size(1), x.size(2), x.size(3)});
  heads.grad = grad.const_data_ptr();
  copy_strides(grad, heads.grad_stride);
}

std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

}  // namespace

RopeParams rope_in_place(Tensor& q, Tensor& k, const Tensor& cos, const Tensor& sin,
                         const std::optional<Tensor>& input_pos, bool interleaved, bool inverse) {
  RopeParams p = params_of(q, cos, sin, input_pos, interleaved);
  p.inverse = inverse;
  p.of[0] = heads_of(q, "q", q, q);
  p.of[1] = heads_of(k, "k", q, k);
  return p;
}

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin,
            const std::optional<Tensor>& input_pos, bool interleaved, bool inverse) {
  const LaunchContext context(x);
  const Tensor heads = dense_heads(x);
  const std::optional<Tensor> positions = contiguous_or_none(input_pos);
  RopeParams p = params_of(heads, cos, sin, positions, interleaved);
  p.inverse = inverse;
  Tensor out = allocate(x, x.sizes());
  p.of[0] = heads_of(heads, "x", heads, out);
  plan_rope(p);
  launch_rope(p, context.stream());
  return out;
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k,
                                        const std::optional<Tensor>& q_norm,
                                        const std::optional<Tensor>& k_norm, const Tensor& cos,
                                        const Tensor& sin, const std::optional<Tensor>& input_pos,
                                        double eps, bool interleaved, bool norm_before_rope,
                                        bool inverse) {
  TTF_CHECK(q_norm.has_value() == k_norm.has_value(), "q_norm and k_norm must be given together");
  const LaunchContext context(q);
  const Tensor dense_q = dense_heads(q), dense_k = dense_heads(k);
  const std::optional<Tensor> positions = contiguous_or_none(input_pos);
  RopeParams p = params_of(dense_q, cos, sin, positions, interleaved);
  p.inverse = inverse;
  p.norm_before_rope = norm_before_rope;
  p.eps = eps;
  Tensor q_out = allocate(q, q.sizes());
  Tensor k_out = allocate(k, k.sizes());
  p.of[0] = heads_of(dense_q, "q", dense_q, q_out);
  p.of[1] = heads_of(dense_k, "k", dense_q, k_out);
  if (q_norm) {
    add_norm(p.of[0], *q_norm, "q_norm", q);
    add_norm(p.of[1], *k_norm, "k_norm", k);
  }
  plan_rope(p);
  launch_rope(p, context.stream());
  return {q_out, k_out};
}

Tensor qk_norm_rope_append(const Tensor& q, const Tensor& k, const Tensor& v,
                           const std::optional<Tensor>& q_norm,
                           const std::optional<Tensor>& k_norm, const Tensor& cos,
                           const Tensor& sin, const std::optional<Tensor>& input_pos, double eps,
                           bool interleaved, bool norm_before_rope, Tensor k_cache, Tensor v_cache,
                           Tensor cache_pos) {
  TTF_CHECK(q_norm.has_value() == k_norm.has_value(), "q_norm and k_norm must be given together");
  const LaunchContext context(q);
  const Tensor dense_q = dense_heads(q), dense_k = dense_heads(k), dense_v = dense_heads(v);
  const std::optional<Tensor> positions = contiguous_or_none(input_pos);
  RopeParams p = params_of(dense_q, cos, sin, positions, interleaved);
  p.norm_before_rope = norm_before_rope;
  p.eps = eps;
  Tensor q_out = allocate(q, q.sizes());
  p.of[0] = heads_of(dense_q, "q", dense_q, q_out);
  p.of[1] = cached_heads_of(dense_k, "k", dense_q, k_cache, "k_cache");
  p.of[2] = cached_heads_of(dense_v, "v", dense_q, v_cache, "v_cache");
  p.of[2].as_they_are = true;
  if (q_norm) {
    add_norm(p.of[0], *q_norm, "q_norm", q);
    add_norm(p.of[1], *k_norm, "k_norm", k);
  }
  check_device(cache_pos, "cache_pos", q);
  check_dtype(cache_pos, "cache_pos", ScalarType::Long);
  check_contiguous(cache_pos, "cache_pos");
  check_shape(v_cache, "v_cache", {-1, -1, k_cache.size(2), -1});
  check_shape(cache_pos, "cache_pos", {k_cache.size(2)});
  p.cache_pos = static_cast<int64_t*>(cache_pos.mutable_data_ptr());
  p.cache_len = cache_pos.size(0);
  plan_rope(p);
  launch_rope(p, context.stream());
  return q_out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k,
    const Tensor& q_norm, const Tensor& k_norm, const Tensor& cos, const Tensor& sin,
    const std::optional<Tensor>& input_pos, double eps, bool interleaved, bool norm_before_rope) {
  const LaunchContext context(q);
  const Tensor dense_q = dense_heads(q), dense_k = dense_heads(k);
  const Tensor dense_grad_q = dense_heads(grad_q), dense_grad_k = dense_heads(grad_k);
  const std::optional<Tensor> positions = contiguous_or_none(input_pos);
  RopeParams p = params_of(dense_q, cos, sin, positions, interleaved);
  p.norm_before_rope = norm_before_rope;
  p.eps = eps;
  Tensor q_out = allocate(q, q.sizes());
  Tensor k_out = allocate(k, k.sizes());
  p.of[0] = heads_of(dense_q, "q", dense_q, q_out);
  p.of[1] = heads_of(dense_k, "k", dense_q, k_out);
  add_norm(p.of[0], q_norm, "q_norm", q);
  add_norm(p.of[1], k_norm, "k_norm", k);
  add_grad(p.of[0], dense_grad_q, "grad_q", q);
  add_grad(p.of[1], dense_grad_k, "grad_k", k);
  plan_rope_backward(p);

  const bool fp64 = p.dtype == DType::kFloat64;
  Tensor partial = allocate(q, {p.of[0].blocks + p.of[1].blocks, int64_t{p.head_dim}},
                            accumulator_of(p.dtype));
  p.of[0].partial = partial.mutable_data_ptr();
  p.of[1].partial =
      static_cast<char*>(p.of[0].partial) + int64_t{p.of[0].blocks} * p.head_dim * (fp64 ? 8 : 4);
  launch_rope_backward(p, context.stream());
  Tensor grad_q_norm = allocate(q_norm, q_norm.sizes());
  Tensor grad_k_norm = allocate(k_norm, k_norm.sizes());
  const RopeHeads* part = p.of;
  for (Tensor* grad_norm : {&grad_q_norm, &grad_k_norm}) {
    launch_column_sum({.partial = part->partial,
                       .out = grad_norm->mutable_data_ptr(),
                       .rows = part->blocks,
                       .columns = p.head_dim,
                       .dtype = fp64 ? DType::kFloat64 : DType::kFloat32,
                       .out_dtype = part->norm_dtype},
                      context.stream());
    ++part;
  }
  return {q_out, k_out, grad_q_norm, grad_k_norm};
}

}  // namespace torchtune_fused
