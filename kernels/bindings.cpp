// Every op of the library, in one place.
//
// The schemas are defined in Python (torchtune_fused/ops), where each op also has its reference;
// this library adds CUDA implementations to them and nothing else, so it is loaded after
// `import torchtune_fused.ops`, and everything runs without it. One IMPL block only: registering
// a namespace twice crashes in the stable ABI.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/torch_utils.h"

namespace torchtune_fused {

// adapter/adapter.cpp
bool adapter_gradients_takes(std::vector<Tensor> grads, std::vector<Tensor> bs, const Tensor& low);
std::tuple<Tensor, std::vector<Tensor>> adapter_gradients(std::vector<Tensor> grads,
                                                          std::vector<Tensor> bs, const Tensor& low,
                                                          double scale);

// attention/attention.cpp
Tensor attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& length, const std::optional<Tensor>& mask, double scale,
                        std::optional<int64_t> window);

// attention/flash_attention.cpp
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& mask,
                                     const std::optional<Tensor>& mask_kinds,
                                     const std::optional<Tensor>& documents, bool causal,
                                     double scale, std::optional<int64_t> window,
                                     std::optional<double> softcap);
std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const std::optional<Tensor>& mask, const std::optional<Tensor>& mask_kinds,
    const std::optional<Tensor>& documents, bool causal, double scale,
    std::optional<int64_t> window, std::optional<double> softcap, bool deterministic,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
    const std::optional<Tensor>& input_pos, bool interleaved);
Tensor attention_prefill(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                         const Tensor& length, const std::optional<Tensor>& mask,
                         const std::optional<Tensor>& mask_kinds, double scale,
                         std::optional<int64_t> window);

// attention/mask_tiles.cpp
std::tuple<Tensor, Tensor> mask_tiles(const Tensor& mask);

// decode/decode.cpp
void decode_embed_(Tensor out, const Tensor& ids, const Tensor& weight);
Tensor decode_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual,
                     const std::optional<Tensor>& norm_weight, double eps, bool fp32_out);
Tensor decode_attend(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& length, const std::optional<Tensor>& mask, const Tensor& weight,
                     const std::optional<Tensor>& bias, const Tensor& residual);
Tensor decode_gated(const Tensor& x, const Tensor& w_gate, const Tensor& w_up,
                    const std::optional<Tensor>& b_gate, const std::optional<Tensor>& b_up,
                    const std::optional<Tensor>& norm_weight, double eps, std::string activation);
Tensor decode_qkv(const Tensor& x, const Tensor& wq, const Tensor& wk, const Tensor& wv,
                  const std::optional<Tensor>& bq, const std::optional<Tensor>& bk,
                  const std::optional<Tensor>& bv, const std::optional<Tensor>& norm_weight,
                  double eps, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                  const std::optional<Tensor>& input_pos, bool interleaved,
                  const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                  double head_eps, bool norm_before_rope, Tensor k_cache, Tensor v_cache,
                  const Tensor& cache_pos);

// mlp/mlp.cpp
bool gated_linear_takes(const Tensor& x, const Tensor& w_gate, const Tensor& w_up,
                        std::vector<Tensor> low);
std::tuple<Tensor, Tensor, Tensor> gated_linear(const Tensor& x, const Tensor& w_gate,
                                                const Tensor& w_up,
                                                const std::optional<Tensor>& low,
                                                const std::optional<Tensor>& b_gate,
                                                const std::optional<Tensor>& b_up,
                                                std::string activation, bool save);
std::tuple<Tensor, Tensor, Tensor> gated_linear_backward(const Tensor& grad, const Tensor& w_down,
                                                         const Tensor& gate, const Tensor& up,
                                                         const std::optional<Tensor>& grad_low,
                                                         const std::optional<Tensor>& a_down,
                                                         std::string activation, bool need_hidden);
Tensor gated_activation(const Tensor& gate, const Tensor& up, std::string activation);
std::tuple<Tensor, Tensor> gated_activation_backward(Tensor grad, const Tensor& gate,
                                                     const Tensor& up, std::string activation,
                                                     bool need_hidden);

// embedding/embedding.cpp
void embedding_add_(Tensor grad_weight, const Tensor& ids, const Tensor& order, const Tensor& grad);

// mlp/grouped_product.cpp
bool grouped_product_takes(std::vector<Tensor> firsts, std::vector<Tensor> seconds,
                           std::vector<int64_t> terms, bool across,
                           const std::optional<Tensor>& addend, const std::optional<Tensor>& cos,
                           const std::optional<Tensor>& sin, const std::optional<Tensor>& input_pos,
                           bool interleaved, int64_t steps);
std::vector<Tensor> grouped_product(std::vector<Tensor> firsts, std::vector<Tensor> seconds,
                                    std::vector<int64_t> terms, bool across,
                                    const std::optional<Tensor>& addend,
                                    const std::optional<Tensor>& cos,
                                    const std::optional<Tensor>& sin,
                                    const std::optional<Tensor>& input_pos, bool interleaved,
                                    int64_t steps);

// mlp/weight_gradient.cpp
bool grouped_weight_gradients_takes(std::vector<Tensor> grads, const Tensor& x);
std::vector<Tensor> grouped_weight_gradients(std::vector<Tensor> grads, const Tensor& x);

// loss/loss.cpp
Tensor cross_entropy_(Tensor logits, const Tensor& targets, const std::optional<Tensor>& grad,
                      int64_t ignore_index, double softcap, double z_loss, bool backward);
void scale_(Tensor x, const Tensor& factor);

// optimizer/adamw.cpp
void adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
            std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, double lr, double beta1,
            double beta2, double eps, double weight_decay, bool maximize);

// sampling/sampling.cpp
Tensor decode_sample(const Tensor& logits, Tensor rng_state, double temperature,
                     std::optional<int64_t> top_k, std::optional<double> top_p);

// norm/norm.cpp
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps,
                                    bool unit_offset);
std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                                const Tensor& weight, double eps, bool unit_offset);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weight, const Tensor& rstd,
                                             const std::optional<Tensor>& grad_skip,
                                             bool unit_offset, bool need_weight);

// rope/rope.cpp
Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin,
            const std::optional<Tensor>& input_pos, bool interleaved, bool inverse);
std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k,
                                        const std::optional<Tensor>& q_norm,
                                        const std::optional<Tensor>& k_norm, const Tensor& cos,
                                        const Tensor& sin, const std::optional<Tensor>& input_pos,
                                        double eps, bool interleaved, bool norm_before_rope,
                                        bool inverse);
Tensor qk_norm_rope_append(const Tensor& q, const Tensor& k, const Tensor& v,
                           const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                           const Tensor& cos, const Tensor& sin,
                           const std::optional<Tensor>& input_pos, double eps, bool interleaved,
                           bool norm_before_rope, Tensor k_cache, Tensor v_cache, Tensor cache_pos);
std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& q, const Tensor& k,
    const Tensor& q_norm, const Tensor& k_norm, const Tensor& cos, const Tensor& sin,
    const std::optional<Tensor>& input_pos, double eps, bool interleaved, bool norm_before_rope);

}  // namespace torchtune_fused

STABLE_TORCH_LIBRARY_IMPL(torchtune_fused, CUDA, m) {
  using namespace torchtune_fused;
  m.impl("adamw_", TORCH_BOX(&adamw_));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_decode", TORCH_BOX(&attention_decode));
  m.impl("attention_prefill", TORCH_BOX(&attention_prefill));
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
  m.impl("decode_embed_", TORCH_BOX(&decode_embed_));
  m.impl("decode_linear", TORCH_BOX(&decode_linear));
  m.impl("decode_attend", TORCH_BOX(&decode_attend));
  m.impl("decode_gated", TORCH_BOX(&decode_gated));
  m.impl("decode_qkv", TORCH_BOX(&decode_qkv));
  m.impl("embedding_add_", TORCH_BOX(&embedding_add_));
  m.impl("adapter_gradients_takes", TORCH_BOX(&adapter_gradients_takes));
  m.impl("adapter_gradients", TORCH_BOX(&adapter_gradients));
  m.impl("grouped_product_takes", TORCH_BOX(&grouped_product_takes));
  m.impl("grouped_product", TORCH_BOX(&grouped_product));
  m.impl("grouped_weight_gradients_takes", TORCH_BOX(&grouped_weight_gradients_takes));
  m.impl("grouped_weight_gradients", TORCH_BOX(&grouped_weight_gradients));
  m.impl("gated_linear_takes", TORCH_BOX(&gated_linear_takes));
  m.impl("gated_linear", TORCH_BOX(&gated_linear));
  m.impl("gated_linear_backward", TORCH_BOX(&gated_linear_backward));
  m.impl("gated_activation", TORCH_BOX(&gated_activation));
  m.impl("gated_activation_backward", TORCH_BOX(&gated_activation_backward));
  m.impl("decode_sample", TORCH_BOX(&decode_sample));
  m.impl("mask_tiles", TORCH_BOX(&mask_tiles));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("rope", TORCH_BOX(&rope));
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_append", TORCH_BOX(&qk_norm_rope_append));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
  m.impl("scale_", TORCH_BOX(&scale_));
}
