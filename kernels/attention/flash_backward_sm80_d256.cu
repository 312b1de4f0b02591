#include "attention/flash_backward_sm80.cuh"

template struct torchtune_fused::FlashBackwardSm80<256>;
