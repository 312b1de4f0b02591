#include "adapter/adapter_backward.cuh"

#include <algorithm>

#include "common/launch.h"

namespace torchtune_fused {
namespace {

constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

template <typename T>
void launch(const AdapterBackwardParams& p, cudaStream_t stream) {
  unsigned column_blocks = 0;
  int64_t results = 0;
  for (int l = 0; l < p.count; ++l) {
    column_blocks += p.layers[l].column_blocks;
    results += p.chunks * kChunk + p.layers[l].column_blocks * kAdapterColumns;
  }
  const auto kernel = adapter_backward_kernel<T>;
  TTF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      kAdapterSharedBytes));
  const dim3 grid(column_blocks, p.token_blocks);
  launch_waiting(kernel, grid, kAdapterThreads, kAdapterSharedBytes, stream, p);
  const int64_t threads = results * (kAdapterRank / 2);
  const unsigned blocks = (threads + kAdapterThreads - 1) / kAdapterThreads;
  launch_waiting(adapter_finish_kernel<T>, blocks, kAdapterThreads, 0, stream, p);
}

}  // namespace

int64_t plan_adapter_backward(AdapterBackwardParams& p) {
  int column_blocks = 0;
  for (int l = 0; l < p.count; ++l) {
    p.layers[l].column_blocks = divide_up(p.layers[l].n, kAdapterColumns);
    column_blocks += p.layers[l].column_blocks;
  }
  // One wave of two blocks an SM (one where shared memory holds no more), so that few sums are
  // partial and no block is late.
  const DeviceProperties& device = device_properties();
  const int slots =
      device.num_sms * (device.max_shared_per_block > 2 * kAdapterSharedBytes ? 2 : 1);
  p.chunks = divide_up(p.rows, kChunk);
  p.chunks_per_block = divide_up(p.chunks, std::max(1, slots / column_blocks));
  p.token_blocks = divide_up(p.chunks, p.chunks_per_block);
  int64_t size = 0;
  for (int l = 0; l < p.count; ++l) {
    AdapterLayer& layer = p.layers[l];
    layer.low_partial = size;
    size += int64_t(layer.column_blocks) * p.chunks * kChunk * kAdapterRank;
    layer.b_partial = size;
    size += int64_t(layer.column_blocks) * p.token_blocks * kAdapterColumns * kAdapterRank;
  }
  return size;
}

void launch_adapter_backward(const AdapterBackwardParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kFloat16) {
    launch<__half>(p, stream);
  } else {
    launch<__nv_bfloat16>(p, stream);
  }
}

}  // namespace torchtune_fused
