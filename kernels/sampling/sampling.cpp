// Sampling: checks on the tensors, and the launches.
#include "sampling/sampling.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "common/launch.h"
#include "common/torch_utils.h"

namespace torchtune_fused {

Tensor decode_sample(const Tensor& logits, Tensor rng_state, double temperature,
                     std::optional<int64_t> top_k, std::optional<double> top_p) {
  check_dtype(logits, "logits", ScalarType::Float);
  check_shape(logits, "logits", {-1, -1});
  check_contiguous(logits, "logits");
  check_device(rng_state, "rng_state", logits);
  check_dtype(rng_state, "rng_state", ScalarType::Long);
  check_shape(rng_state, "rng_state", {2});
  check_contiguous(rng_state, "rng_state");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  // Sums of 2^22 masses of 40 bits fit into 64.
  TTF_CHECK(vocab > 0 && vocab <= 1 << 22 && rows < 65536,
            "logits must be at most [65535, 2^22], got ", shape_string(logits));
  TTF_CHECK(!top_k || *top_k >= 1, "top_k must be at least 1, got ", *top_k);
  TTF_CHECK(!top_p || *top_p > 0, "top_p must be above 0, got ", *top_p);

  const LaunchContext context(logits);
  const bool draws = temperature > 0;
  const bool has_top_k = draws && top_k && *top_k < vocab, has_top_p = draws && top_p && *top_p < 1;
  const bool in_clusters =
      has_top_k && *top_k <= kClusterTopK && vocab <= kClusterVocab && runs_sm90_code();
  const bool filters = !in_clusters && (has_top_k || has_top_p);
  const int64_t slices = (vocab + kSliceTokens - 1) / kSliceTokens;
  Tensor tokens = allocate(logits, {rows}, ScalarType::Long);
  if (rows == 0) return tokens;

  // One workspace for all, in words of 8 bytes; what wants 16 bytes comes first.
  const int64_t candidate_words = filters ? rows * vocab * (sizeof(Candidate) / 8) : 0;
  const int64_t state_words = filters ? rows * (sizeof(RowState) / 8) : 0;
  Tensor workspace =
      allocate(logits, {candidate_words + state_words + 2 * rows * slices}, ScalarType::Long);
  auto* words = static_cast<uint64_t*>(workspace.mutable_data_ptr());
  uint64_t* states = words + candidate_words;
  uint64_t* best_logit = states + state_words;
  const auto* data = static_cast<const float*>(logits.const_data_ptr());
  const double largest_float = std::numeric_limits<float>::max();
  const SampleParams params = {
      .logits = data,
      .tokens = static_cast<int64_t*>(tokens.mutable_data_ptr()),
      .rng_state = static_cast<int64_t*>(rng_state.mutable_data_ptr()),
      .best_logit = best_logit,
      .best_drawn = draws ? best_logit + rows * slices : nullptr,
      .states = filters ? reinterpret_cast<RowState*>(states) : nullptr,
      .candidates = filters ? reinterpret_cast<Candidate*>(words) : nullptr,
      .top_p = has_top_p ? *top_p : 1,
      .inverse_temperature =
          draws ? static_cast<float>(std::min(1 / temperature, largest_float)) : 0,
      .top_k = has_top_k ? static_cast<int>(*top_k) : 0,
      .rows = static_cast<int>(rows),
      .vocab = static_cast<int>(vocab),
      .slices = static_cast<int>(slices),
      .aligned = vocab % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0};
#ifdef TTF_HAS_SM90
  if (in_clusters) {
    launch_top_k(params, context.stream());
    return tokens;
  }
#endif
  launch_sample(params, context.stream());
  return tokens;
}

}  // namespace torchtune_fused
