#include "attention/flash_forward_sm90.cuh"

template struct torchtune_fused::FlashForwardSm90<256>;
