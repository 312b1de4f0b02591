// Decoding attention whose splits form clusters.
#include "attention/decode_attention.cuh"

template struct torchtune_fused::DecodeAttention<64, true>;
template struct torchtune_fused::DecodeAttention<80, true>;
template struct torchtune_fused::DecodeAttention<96, true>;
template struct torchtune_fused::DecodeAttention<128, true>;
template struct torchtune_fused::DecodeAttention<256, true>;
