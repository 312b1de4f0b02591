#include "attention/flash_backward_sm90.cuh"

template struct torchtune_fused::FlashBackwardSm90<128>;
