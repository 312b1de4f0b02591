// Sums over the blocks of a kernel, in an order that is always the same.
#pragma once

#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

struct ColumnSumParams {
  const void* partial;  // [rows, columns]
  void* out;            // [columns]
  int64_t rows;
  int64_t columns;
  DType dtype;  // of partial, fp32 or fp64
  DType out_dtype;
};

void launch_column_sum(const ColumnSumParams& params, cudaStream_t stream);

}  // namespace torchtune_fused
