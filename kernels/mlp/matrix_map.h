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
  return swizzled_map<2>(data, sizes, row_bytes, {64, static_cast<cuuint32_t>(tile_rows)}, dtype);
}

}  // namespace torchtune_fused
