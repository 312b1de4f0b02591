#include "attention/decode_attention.cuh"

template struct torchtune_fused::DecodeAttention<96, false>;
