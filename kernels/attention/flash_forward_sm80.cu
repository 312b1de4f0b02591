// Chooses among the instantiations of flash_forward_sm80.cuh.
#include "attention/flash_attention.h"

namespace torchtune_fused {

template <int D>
struct FlashForwardSm80 {
  static void launch(const FlashAttentionParams& params, cudaStream_t stream);
};

void launch_flash_forward_sm80(const FlashAttentionParams& p, cudaStream_t stream) {
  const int d = p.head_dim;
  TTF_CHECK(d > 0 && d <= 256 && d % 8 == 0,
            "the head dimension must be a multiple of 8 up to 256, got ", d);
  if (p.queries == 0 || p.batch == 0) return;
  if (d <= 64) return FlashForwardSm80<64>::launch(p, stream);
  if (d <= 96) return FlashForwardSm80<96>::launch(p, stream);
  if (d <= 128) return FlashForwardSm80<128>::launch(p, stream);
  FlashForwardSm80<256>::launch(p, stream);
}

}  // namespace torchtune_fused
