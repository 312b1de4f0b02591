// Dense masks in the form that flash_attention.h asks for.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

struct MaskTilesParams {
  const unsigned char* mask;  // bool [batch, heads, queries, keys], unit last stride
  int64_t mask_stride[3];     // 0 where one mask serves all
  unsigned char* kinds;       // [batch, heads, ceil(queries / 64), ceil(keys / 64)]
  uint32_t* bits;             // [batch, heads, queries, 2 * ceil(keys / 64)]
  int batch, heads, queries, keys;
};

void launch_mask_tiles(const MaskTilesParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
