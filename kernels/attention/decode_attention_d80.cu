#include "attention/decode_attention.cuh"

template struct torchtune_fused::DecodeAttention<80, false>;
