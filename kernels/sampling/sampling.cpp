// Sampling: checks on the tensors, and the launches.
#include "sampling/sampling.h"

#include "common/torch_utils.h"

namespace torchtune_fused {

Tensor decode_sample(const Tensor& logits, Tensor rng_state, double temperature) {
  check_dtype(logits, "logits", ScalarType::Float);
  check_shape(logits, "logits", {-1, -1});
  check_contiguous(logits, "logits");
  check_device(rng_state, "rng_state", logits);
  check_dtype(rng_state, "rng_state", ScalarType::Long);
  check_shape(rng_state, "rng_state", {2});
  check_contiguous(rng_state, "rng_state");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  TTF_CHECK(vocab > 0 && vocab < 1 << 30 && rows < 65536, "logits must be at most [65535, 2^30], got ",
            shape_string(logits));

  const LaunchContext context(logits);
  Tensor tokens = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
  Tensor best = torch::stable::new_empty(logits, {rows, kSampleBlocks}, ScalarType::Long);
  if (rows == 0) return tokens;
  launch_sample({.logits = static_cast<const float*>(logits.const_data_ptr()),
                 .tokens = static_cast<int64_t*>(tokens.mutable_data_ptr()),
                 .rng_state = static_cast<int64_t*>(rng_state.mutable_data_ptr()),
                 .best = static_cast<uint64_t*>(best.mutable_data_ptr()),
                 .inverse_temperature = temperature > 0 ? static_cast<float>(1 / temperature) : 0.f,
                 .rows = static_cast<int>(rows),
                 .vocab = static_cast<int>(vocab)},
                context.stream());
  return tokens;
}

}  // namespace torchtune_fused
