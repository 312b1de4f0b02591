#include "attention/flash_forward_sm80.cuh"

template struct torchtune_fused::FlashForwardSm80<96>;
