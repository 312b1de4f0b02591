// Matrices as TMA sees them.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"
#include "common/tensor_map.h"

namespace torchtune_fused {

// A row-major matrix of 16-bit elements, in swizzled tiles of `tile_rows` rows and 64 columns. Rows
// start `row_stride` elements apart; 0: they are dense.
inline CUtensorMap matrix_map(const void* data, int rows, int columns, int tile_rows, DType dtype,
                              int64_t row_stride = 0) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {2 * (row_stride ? row_stride : sizes[0])};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(tile_rows)}, steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map,
      dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, const_cast<void*>(data), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TTF_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled returned error ", result,
            " for a matrix of ", rows, " rows and ", columns, " columns");
  return map;
}

}  // namespace torchtune_fused
