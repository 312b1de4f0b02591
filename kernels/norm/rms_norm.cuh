// RMSNorm (Zhang and Sennrich, 2019): y = x * rstd * w, rstd = 1 / sqrt(mean(x^2) + eps), where w
// is the weight, or 1 + weight. Backward, with n = x * rstd and g the gradient of y:
//   grad_x = rstd * (g * w - n * mean(g * w * n)),  grad_weight = sum over the rows of g * n.
// Optionally of the residual stream: x is a sum that is made on the way, rounded to its dtype and
// stored too; backward, the gradient that reached the stream past the norm is added to grad_x.
//
// Memory: x, residual, sum, y and their gradients [rows, dim], weight [dim], rstd [rows], all
// contiguous.
//
// Rows of whole 16-byte vectors are read once and kept on chip: `threads_per_row`, a power of two,
// holds kVectors vectors a thread, and a block has as many rows as make 128 threads, or one. The
// backward pass is one wave of blocks that stride over the rows, each with its own sum of the
// weight's gradient in registers, while the next row is under way to shared memory. What does not
// fit (16 KiB a row at most) takes a block per row that reads it twice.
#pragma once

#include "common/elements.cuh"
#include "common/ptx.cuh"
#include "common/types.cuh"
#include "common/vec.cuh"
#include "norm/norm.h"

namespace torchtune_fused {

constexpr int kVectors = 2;
constexpr int kStages = 2;
constexpr int kMinBlock = 128;
constexpr int kMaxBlock = 512;

template <typename T>
__device__ __forceinline__ uint4 add_vec(uint4 a, uint4 b) {
  float sum[kVecSize<T>], other[kVecSize<T>];
  unpack_vec<T>(a, sum);
  unpack_vec<T>(b, other);
#pragma unroll
  for (int i = 0; i < kVecSize<T>; ++i) sum[i] += other[i];
  return pack_vec<T>(sum);
}

// The sum over the threads of each row; `shared` has a place for every warp of the block, and is read
// after the only barrier here: the next call takes another one, or comes after another barrier.
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
  wait_for_grid();
  const int lane = threadIdx.x & (threads_per_row - 1);
  const int64_t row = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / threads_per_row;
  const bool valid = row < p.rows;
  const int vectors = static_cast<int>(p.dim) / kVecSize<T>;
  const int64_t first = row * vectors;

  uint4 raw[kVectors];
  const auto load = [&](const void* from, uint4 (&to)[kVectors]) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * threads_per_row;
      const bool read = valid && vector < vectors;
      to[i] = read ? static_cast<const uint4*>(from)[first + vector] : uint4{0, 0, 0, 0};
    }
  };
  load(p.x, raw);
  if (p.residual != nullptr) {
    uint4 residual[kVectors];
    load(p.residual, residual);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * threads_per_row;
      raw[i] = add_vec<T>(raw[i], residual[i]);
      if (valid && vector < vectors) static_cast<uint4*>(p.sum)[first + vector] = raw[i];
    }
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
    static_cast<uint4*>(p.y)[first + vector] = pack_vec<T>(values);
  }
}

// What a row takes in the ring of the backward pass: x, its gradient, and what is added to that.
__host__ __device__ inline int row_parts(const RmsNormBackwardParams& p) {
  return p.grad_skip == nullptr ? 2 : 3;
}

template <typename T>
__global__ void __launch_bounds__(kMaxBlock)
    rms_norm_backward_kernel(const __grid_constant__ RmsNormBackwardParams p, int threads_per_row) {
  wait_for_grid();
  constexpr int kSize = kVecSize<T>;
  const int lane = threadIdx.x & (threads_per_row - 1);
  const int rows_per_block = blockDim.x / threads_per_row, slot = threadIdx.x / threads_per_row;
  const int vectors = static_cast<int>(p.dim) / kSize, parts = row_parts(p);
  __shared__ float shared[kStages][kMaxBlock / 32];
  // [kStages][parts][kVectors][blockDim.x]: each thread reads only what it has copied itself, which
  // is zeros beyond the row's end.
  extern __shared__ uint4 ring[];
  float w[kVectors][kSize] = {}, grad_weight[kVectors][kSize] = {};
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = lane + i * threads_per_row;
    if (vector >= vectors) break;
    load_weight<T>(p.weight, p.weight_dtype, vector, static_cast<float>(p.weight_offset), w[i]);
  }

  const auto place = [&](int stage, int part, int i) -> uint4& {
    return ring[((stage * parts + part) * kVectors + i) * blockDim.x + threadIdx.x];
  };
  const auto fetch = [&](int64_t row, int stage) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * threads_per_row;
      const bool read = row < p.rows && vector < vectors;
      const int64_t at = read ? row * vectors + vector : 0;
      const auto copy = [&](int part, const void* from) {
        copy_async_16(shared_address(&place(stage, part, i)), static_cast<const uint4*>(from) + at,
                      read);
      };
      copy(0, p.x);
      copy(1, p.grad);
      if (parts == 3) copy(2, p.grad_skip);
    }
    copy_async_commit();
  };
  const auto rstd_of = [&](int64_t row) {
    return row < p.rows ? static_cast<const float*>(p.rstd)[row] : 0.f;
  };

  const int64_t step = gridDim.x * int64_t{rows_per_block};
  int64_t row = blockIdx.x * int64_t{rows_per_block} + slot;
  int stage = 0;
  fetch(row, stage);
  float rstd = rstd_of(row);
  for (; row - slot < p.rows; row += step) {  // as often for every thread of the block
    const float next_rstd = rstd_of(row + step);
    fetch(row + step, stage ^ 1);
    copy_async_wait<kStages - 1>();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float x[kSize], grad[kSize];
      unpack_vec<T>(place(stage, 0, i), x);
      unpack_vec<T>(place(stage, 1, i), grad);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float normed = x[j] * rstd;
        sum = fmaf(grad[j] * w[i][j], normed, sum);
        grad_weight[i][j] = fmaf(grad[j], normed, grad_weight[i][j]);
      }
    }
    const float mean = row_sum(sum, threads_per_row, shared[stage]) / static_cast<float>(p.dim);
    const float factor = -mean * rstd * rstd;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float x[kSize], grad[kSize], skip[kSize] = {};
      unpack_vec<T>(place(stage, 0, i), x);
      unpack_vec<T>(place(stage, 1, i), grad);
      if (parts == 3) unpack_vec<T>(place(stage, 2, i), skip);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        grad[j] = fmaf(grad[j] * w[i][j], rstd, fmaf(x[j], factor, skip[j]));
      }
      const int vector = lane + i * threads_per_row;
      if (row < p.rows && vector < vectors) {
        static_cast<uint4*>(p.grad_x)[row * vectors + vector] = pack_vec<T>(grad);
      }
    }
    stage ^= 1;
    rstd = next_rstd;
  }
  copy_async_wait<0>();

  // The rows of a block that lie side by side are added up in order, where the ring was.
  if (p.partial == nullptr) return;
  launch_dependents();  // the few blocks that add up the rows of `partial`
  float* partial = static_cast<float*>(p.partial) + blockIdx.x * p.dim;
  float* rows = reinterpret_cast<float*>(ring);
  float* own = rows_per_block > 1 ? rows + slot * p.dim : partial;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int vector = lane + i * threads_per_row;
    if (vector >= vectors) break;
#pragma unroll
    for (int j = 0; j < kSize; j += 4) {
      const float* four = grad_weight[i] + j;
      *reinterpret_cast<float4*>(own + vector * kSize + j) = {four[0], four[1], four[2], four[3]};
    }
  }
  if (rows_per_block == 1) return;
  __syncthreads();
  for (int column = threadIdx.x; column < p.dim; column += blockDim.x) {
    float sum = 0.f;
    for (int i = 0; i < rows_per_block; ++i) sum += rows[i * p.dim + column];
    partial[column] = sum;
  }
}

// ---- Rows of any length and alignment, and fp64 -------------------------------------------------

constexpr int kAnyBlock = 256;

template <typename T>
__global__ void __launch_bounds__(kAnyBlock)
    rms_norm_any_kernel(const __grid_constant__ RmsNormParams p) {
  wait_for_grid();
  using Acc = AccOf<T>;
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(p.x) + row * p.dim;
  const T* residual = static_cast<const T*>(p.residual) + row * p.dim;
  T* added = static_cast<T*>(p.sum) + row * p.dim;
  T* y = static_cast<T*>(p.y) + row * p.dim;
  __shared__ Acc shared[kAnyBlock / 32];

  Acc sum = 0;
  for (int64_t i = threadIdx.x; i < p.dim; i += kAnyBlock) {
    Acc value = static_cast<Acc>(x[i]);
    if (p.residual != nullptr) {
      added[i] = static_cast<T>(value + static_cast<Acc>(residual[i]));
      value = static_cast<Acc>(added[i]);
    }
    sum += value * value;
  }
  sum = row_sum(sum, kAnyBlock, shared);
  const Acc rstd = rsqrt(sum / static_cast<Acc>(p.dim) + static_cast<Acc>(p.eps));
  if (threadIdx.x == 0) static_cast<Acc*>(p.rstd)[row] = rstd;
  const T* normed = p.residual == nullptr ? x : added;
  for (int64_t i = threadIdx.x; i < p.dim; i += kAnyBlock) {
    const Acc w =
        load_element<Acc>(p.weight, i, p.weight_dtype) + static_cast<Acc>(p.weight_offset);
    y[i] = static_cast<T>(static_cast<Acc>(normed[i]) * rstd * w);
  }
}

template <typename T>
__global__ void __launch_bounds__(kAnyBlock)
    rms_norm_backward_any_kernel(const __grid_constant__ RmsNormBackwardParams p) {
  wait_for_grid();
  using Acc = AccOf<T>;
  __shared__ Acc shared[kAnyBlock / 32];
  Acc* partial = static_cast<Acc*>(p.partial) + blockIdx.x * p.dim;
  const bool sum_up = p.partial != nullptr;
  const auto weight = [&p](int64_t i) {
    return load_element<Acc>(p.weight, i, p.weight_dtype) + static_cast<Acc>(p.weight_offset);
  };
  for (int64_t i = threadIdx.x; sum_up && i < p.dim; i += kAnyBlock) partial[i] = 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(p.x) + row * p.dim;
    const T* grad = static_cast<const T*>(p.grad) + row * p.dim;
    const T* skip = static_cast<const T*>(p.grad_skip) + row * p.dim;
    T* grad_x = static_cast<T*>(p.grad_x) + row * p.dim;
    const Acc rstd = static_cast<const Acc*>(p.rstd)[row];
    Acc sum = 0;
    for (int64_t i = threadIdx.x; i < p.dim; i += kAnyBlock) {
      const Acc normed = static_cast<Acc>(x[i]) * rstd, g = static_cast<Acc>(grad[i]);
      sum += g * weight(i) * normed;
      if (sum_up) partial[i] += g * normed;
    }
    const Acc mean = row_sum(sum, kAnyBlock, shared) / static_cast<Acc>(p.dim);
    for (int64_t i = threadIdx.x; i < p.dim; i += kAnyBlock) {
      const Acc normed = static_cast<Acc>(x[i]) * rstd, g = static_cast<Acc>(grad[i]);
      const Acc more = p.grad_skip == nullptr ? Acc{0} : static_cast<Acc>(skip[i]);
      grad_x[i] = static_cast<T>(rstd * (g * weight(i) - normed * mean) + more);
    }
    __syncthreads();  // before the next row's sums
  }
}

}  // namespace torchtune_fused
