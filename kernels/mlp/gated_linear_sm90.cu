#include "mlp/gated_linear.cuh"

namespace torchtune_fused {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// By way of the runtime, so that the library needs no libcuda to be linked.
Encode tensor_map_encoder() {
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    TTF_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
    TTF_CHECK(found == cudaDriverEntryPointSuccess,
              "the driver has no cuTensorMapEncodeTiled: update it to one for CUDA 12 or later");
    return reinterpret_cast<Encode>(function);
  }();
  return encode;
}

// A row-major matrix of 16-bit elements, in swizzled tiles of `tile_rows` rows and 64 columns.
CUtensorMap matrix_map(const void* data, int rows, int columns, int tile_rows, DType dtype) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {2 * sizes[0]};
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

template <typename T>
void launch(const GatedLinearParams& p, cudaStream_t stream) {
  const GatedLinearMaps maps = {
      .x = matrix_map(p.x, p.rows, p.k, kRows, p.dtype),
      .gate_weight = matrix_map(p.gate_weight, p.n, p.k, kColumns, p.dtype),
      .up_weight = matrix_map(p.up_weight, p.n, p.k, kColumns, p.dtype),
      .hidden = matrix_map(p.hidden, p.rows, p.n, 64, p.dtype),
      .gate = matrix_map(p.gate ? p.gate : p.hidden, p.rows, p.n, 64, p.dtype),
      .up = matrix_map(p.up ? p.up : p.hidden, p.rows, p.n, 64, p.dtype),
  };
  const auto kernel = gated_linear_kernel<T>;
  TTF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      kLinearSharedBytes));
  const unsigned blocks = device_properties().num_sms / 2 * 2;
  kernel<<<blocks, kLinearThreads, kLinearSharedBytes, stream>>>(
      maps, {p.rows, p.n, p.k, p.activation, p.gate != nullptr});
  TTF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

bool gated_linear_sm90_takes(const GatedLinearParams& p) {
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  // Fewer rows leave the second block of a cluster idle, or most of the GPU.
  return p.rows >= kMinRows && p.n % 8 == 0 && p.k % 8 == 0 && p.k > 0 && aligned(p.x) &&
         aligned(p.gate_weight) && aligned(p.up_weight);
}

void launch_gated_linear_sm90(const GatedLinearParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kFloat16) {
    launch<__half>(p, stream);
  } else {
    launch<__nv_bfloat16>(p, stream);
  }
}

}  // namespace torchtune_fused
