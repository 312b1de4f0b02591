// RMSNorm (Zhang and Sennrich, 2019): y = x * rstd * w, rstd = 1 / sqrt(mean(x^2) + eps), where w
// is the weight, or 1 + weight. Backward, with n = x * rstd and g the gradient of y:
//   grad_x = rstd * (g * w - n * mean(g * w * n)),  grad_weight = sum over the rows of g * n.
//
// Memory: x, y and their gradients [rows, dim], weight [dim], rstd [rows], all contiguous.
//
// Rows of whole 16-byte vectors are read once and kept in registers: `threads_per_row`, a power of
// two, holds kVectors vectors a thread, and a block has as many rows as make 128 threads, or one.
// The backward pass is one wave of blocks that stride over the rows, each with its own sum of the
// weight's gradient in registers. What does not fit takes a block per row that reads it twice.
#pragma once

#include "common/elements.cuh"
#include "common/types.cuh"
#include "common/vec.cuh"
#include "norm/norm.h"

namespace torchtune_fused {

constexpr int kVectors = 4;
constexpr int kMinBlock = 128;
constexpr int kMaxBlock = 512;

// The sum over the threads of each row; `shared` has a place for every warp of the block.
template <typename Acc>
__device__ __forceinline__ Acc row_sum(Acc value, int threads_per_row, Acc* shared) {
  for (int offset = min(threads_per_row, 32) / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(~0u, value, offset);
  }
  if (threads_per_row <= 32) return value;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  const int warps = threads_per_row / 32, first = threadIdx.x / threads_per_row * warps;
  value = 0;
  for (int warp = 0; warp < warps; ++warp) value += shared[first + warp];
  __syncthreads();
  return value;
}

template <typename T>
__device__ __forceinline__ void load_weight(const void* weight, DType dtype, int vector,
                                            float offset, float (&w)[kVecSize<T>]) {
  if (dtype == DType::kFloat64 || (dtype != DType::kFloat32 && sizeof(T) == 4)) {
#pragma unroll
    for (int j = 0; j < kVecSize<T>; ++j) {
      w[j] = load_element<float>(weight, vector * kVecSize<T> + j, dtype);
    }
  } else if (dtype == DType::kFloat32) {
    const float4* data = static_cast<const float4*>(weight) + vector * (kVecSize<T> / 4);
#pragma unroll
    for (int j = 0; j < kVecSize<T>; j += 4) {
      const float4 four = data[j / 4];
      w[j] = four.x, w[j + 1] = four.y, w[j + 2] = four.z, w[j + 3] = four.w;
    }
  } else {
    const uint4 v = static_cast<const uint4*>(weight)[vector];
    if constexpr (sizeof(T) == 2) {
      if (dtype == DType::kFloat16) {
        unpack_vec<__half>(v, w);
      } else {
        unpack_vec<__nv_bfloat16>(v, w);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kVecSize<T>; ++j) w[j] += offset;
}

template <typename T>
__global__ void __launch_bounds__(kMaxBlock)
    rms_norm_kernel(const __grid_constant__ RmsNormParams p, int threads_per_row) {
  const int lane = threadIdx.x & (threads_per_row - 1);
  const int64_t row = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / threads_per_row;
  const int vectors = static_cast<int>(p.dim) / kVecSize<T>;
  const bool valid = row < p.rows;
  const uint4* x = static_cast<const uint4*>(p.x) + row * vectors;
  uint4* y = static_cast<uint4*>(p.y) + row * vectors;

  uint4 raw[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = lane + i * threads_per_row;
    raw[i] = valid && vector < vectors ? x[vector] : uint4{0, 0, 0, 0};
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float values[kVecSize<T>];
    unpack_vec<T>(raw[i], values);
#pragma unroll
    for (float value : values) sum = fmaf(value, value, sum);
  }
  __shared__ float shared[kMaxBlock / 32];
  sum = row_sum(sum, threads_per_row, shared);
  if (!valid) return;
  const float rstd = rsqrtf(sum / static_cast<float>(p.dim) + static_cast<float>(p.eps));
  if (lane == 0) static_cast<float*>(p.rstd)[row] = rstd;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = lane + i * threads_per_row;
    if (vector >= vectors) break;
    float values[kVecSize<T>], w[kVecSize<T>];
    unpack_vec<T>(raw[i], values);
    load_weight<T>(p.weight, p.weight_dtype, vector, static_cast<float>(p.weight_offset), w);
#pragma unroll
    for (int j = 0; j < kVecSize<T>; ++j) values[j] *= rstd * w[j];
    y[vector] = pack_vec<T>(values);
  }
}

template <typename T>
__global__ void __launch_bounds__(kMaxBlock)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBackwardParams p, int threads_per_row) {
  constexpr int kSize = kVecSize<T>;
  const int lane = threadIdx.x & (threads_per_row - 1);
  const int rows_per_block = blockDim.x / threads_per_row, slot = threadIdx.x / threads_per_row;
  const int vectors = static_cast<int>(p.dim) / kSize;
  const float weight_offset = static_cast<float>(p.weight_offset);
  __shared__ float shared[kMaxBlock / 32];
  float grad_weight[kVectors][kSize] = {};

  for (int64_t base = blockIdx.x * int64_t{rows_per_block}; base < p.rows;
       base += gridDim.x * int64_t{rows_per_block}) {
    const int64_t row = base + slot;
    const bool valid = row < p.rows;
    uint4 raw_x[kVectors], raw_grad[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * threads_per_row;
      const bool read = valid && vector < vectors;
      const uint4 zero = {0, 0, 0, 0};
      raw_x[i] = read ? static_cast<const uint4*>(p.x)[row * vectors + vector] : zero;
      raw_grad[i] = read ? static_cast<const uint4*>(p.grad)[row * vectors + vector] : zero;
    }
    const float rstd = valid ? static_cast<const float*>(p.rstd)[row] : 0.f;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * threads_per_row;
      if (vector >= vectors) break;
      float x[kSize], grad[kSize], w[kSize];
      unpack_vec<T>(raw_x[i], x);
      unpack_vec<T>(raw_grad[i], grad);
      load_weight<T>(p.weight, p.weight_dtype, vector, weight_offset, w);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float normed = x[j] * rstd;
        sum = fmaf(grad[j] * w[j], normed, sum);
        grad_weight[i][j] = fmaf(grad[j], normed, grad_weight[i][j]);
      }
    }
    const float mean = row_sum(sum, threads_per_row, shared) / static_cast<float>(p.dim);
    if (!valid) continue;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * threads_per_row;
      if (vector >= vectors) break;
      float x[kSize], grad[kSize], w[kSize];
      unpack_vec<T>(raw_x[i], x);
      unpack_vec<T>(raw_grad[i], grad);
      load_weight<T>(p.weight, p.weight_dtype, vector, weight_offset, w);
#pragma unroll
      for (int j = 0; j < kSize; ++j) grad[j] = rstd * (grad[j] * w[j] - x[j] * rstd * mean);
      static_cast<uint4*>(p.grad_x)[row * vectors + vector] = pack_vec<T>(grad);
    }
  }

  // The rows of a block that lie side by side are added up in order.
  float* partial = static_cast<float*>(p.partial) + blockIdx.x * p.dim;
  __shared__ float sums[kMinBlock * kVectors * kSize];
  if (rows_per_block > 1) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int first = (lane + i * threads_per_row) * kSize;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (first < p.dim) sums[slot * p.dim + first + j] = grad_weight[i][j];
      }
    }
    __syncthreads();
    for (int column = threadIdx.x; column < p.dim; column += blockDim.x) {
      float sum = 0.f;
      for (int i = 0; i < rows_per_block; ++i) sum += sums[i * p.dim + column];
      partial[column] = sum;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int first = (lane + i * threads_per_row) * kSize;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (first < p.dim) partial[first + j] = grad_weight[i][j];
    }
  }
}

// ---- Rows of any length and alignment, and fp64 -------------------------------------------------

constexpr int kAnyBlock = 256;

template <typename T>
__global__ void __launch_bounds__(kAnyBlock)
    rms_norm_any_kernel(const __grid_constant__ RmsNormParams p) {
  using Acc = AccOf<T>;
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.dim;
  T* y = static_cast<T*>(p.y) + row * p.dim;
  __shared__ Acc shared[kAnyBlock / 32];

  Acc sum = 0;
  for (int64_t i = threadIdx.x; i < p.dim; i += kAnyBlock) {
    const Acc value = static_cast<Acc>(x[i]);
    sum += value * value;
  }
  sum = row_sum(sum, kAnyBlock, shared);
  const Acc rstd = rsqrt(sum / static_cast<Acc>(p.dim) + static_cast<Acc>(p.eps));
  if (threadIdx.x == 0) static_cast<Acc*>(p.rstd)[row] = rstd;
  for (int64_t i = threadIdx.x; i < p.dim; i += kAnyBlock) {
    const Acc w =
        load_element<Acc>(p.weight, i, p.weight_dtype) + static_cast<Acc>(p.weight_offset);
    y[i] = static_cast<T>(static_cast<Acc>(x[i]) * rstd * w);
  }
}

template <typename T>
__global__ void __launch_bounds__(kAnyBlock)
    rms_norm_backward_any_kernel(const __grid_constant__ RmsNormBackwardParams p) {
  using Acc = AccOf<T>;
  __shared__ Acc shared[kAnyBlock / 32];
  Acc* partial = static_cast<Acc*>(p.partial) + blockIdx.x * p.dim;
  const auto weight = [&p](int64_t i) {
    return load_element<Acc>(p.weight, i, p.weight_dtype) + static_cast<Acc>(p.weight_offset);
  };
  for (int64_t i = threadIdx.x; i < p.dim; i += kAnyBlock) partial[i] = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.dim;
    const T* grad = static_cast<const T*>(p.grad) + row * p.dim;
    T* grad_x = static_cast<T*>(p.grad_x) + row * p.dim;
    const Acc rstd = static_cast<const Acc*>(p.rstd)[row];
    Acc sum = 0;
    for (int64_t i = threadIdx.x; i < p.dim; i += kAnyBlock) {
      const Acc normed = static_cast<Acc>(x[i]) * rstd, g = static_cast<Acc>(grad[i]);
      sum += g * weight(i) * normed;
      partial[i] += g * normed;
    }
    const Acc mean = row_sum(sum, kAnyBlock, shared) / static_cast<Acc>(p.dim);
    for (int64_t i = threadIdx.x; i < p.dim; i += kAnyBlock) {
      const Acc normed = static_cast<Acc>(x[i]) * rstd, g = static_cast<Acc>(grad[i]);
      grad_x[i] = static_cast<T>(rstd * (g * weight(i) - normed * mean));
    }
  }
}

}  // namespace torchtune_fused
