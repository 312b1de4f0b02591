// Grid: one block per 32 columns. Block: 32 columns x 32 strides over the rows.
#include "common/column_sum.h"
#include "common/elements.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"

namespace torchtune_fused {
namespace {

template <typename Acc>
__global__ void __launch_bounds__(1024) column_sum_kernel(ColumnSumParams p) {
  wait_for_grid();
  const int64_t column = blockIdx.x * int64_t{32} + threadIdx.x;
  const Acc* partial = static_cast<const Acc*>(p.partial);
  Acc sum = 0;
  if (column < p.columns) {
    for (int64_t row = threadIdx.y; row < p.rows; row += 32)
      sum += partial[row * p.columns + column];
  }
  __shared__ Acc sums[32][33];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  sum = sums[threadIdx.x][threadIdx.y];  // a warp now has the 32 sums of one column
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  const int64_t summed = blockIdx.x * int64_t{32} + threadIdx.y;
  if (threadIdx.x == 0 && summed < p.columns) store_element(p.out, summed, p.out_dtype, sum);
}

}  // namespace

void launch_column_sum(const ColumnSumParams& params, cudaStream_t stream) {
  if (params.columns == 0) return;
  const unsigned blocks = static_cast<unsigned>((params.columns + 31) / 32);
  const auto kernel =
      params.dtype == DType::kFloat64 ? column_sum_kernel<double> : column_sum_kernel<float>;
  launch_waiting(kernel, blocks, dim3(32, 32), 0, stream, params);
}

}  // namespace torchtune_fused
