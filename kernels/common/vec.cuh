// Pairs of 16-bit floats packed in 32 bits, and 16-byte vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace torchtune_fused {

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t packed);

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t packed) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(packed));
}

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t packed) {
  return __half22float2(reinterpret_cast<const __half2&>(packed));
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <typename T>
__device__ __forceinline__ float sum_of_squares(uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = unpack<T>(words[i]);
    sum = fmaf(f.x, f.x, fmaf(f.y, f.y, sum));
  }
  return sum;
}

template <typename T>
__device__ __forceinline__ float dot(uint4 a, uint4 b) {
  const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = unpack<T>(left[i]), g = unpack<T>(right[i]);
    sum = fmaf(f.x, g.x, fmaf(f.y, g.y, sum));
  }
  return sum;
}

// v * scale * weight, elementwise in fp32 and rounded once.
template <typename T>
__device__ __forceinline__ uint4 scale_by(uint4 v, float scale, uint4 weight) {
  const auto one = [scale](uint32_t value, uint32_t w) {
    const float2 f = unpack<T>(value), g = unpack<T>(w);
    return pack<T>(f.x * scale * g.x, f.y * scale * g.y);
  };
  return {one(v.x, weight.x), one(v.y, weight.y), one(v.z, weight.z), one(v.w, weight.w)};
}

// a * b, elementwise.
template <typename T>
__device__ __forceinline__ uint4 multiply(uint4 a, uint4 b) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const auto one = [](uint32_t x, uint32_t y) {
    const Pair product =
        __hmul2(reinterpret_cast<const Pair&>(x), reinterpret_cast<const Pair&>(y));
    return reinterpret_cast<const uint32_t&>(product);
  };
  return {one(a.x, b.x), one(a.y, b.y), one(a.z, b.z), one(a.w, b.w)};
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// ---- 16 bytes of any of fp16, bf16 and fp32 -----------------------------------------------------

template <typename T>
constexpr int kVecSize = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ void unpack_vec(uint4 v, float (&f)[kVecSize<T>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      f[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack<T>(words[i]);
      f[2 * i] = pair.x;
      f[2 * i + 1] = pair.y;
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack_vec(const float (&f)[kVecSize<T>]) {
  if constexpr (sizeof(T) == 4) {
    return {__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]),
            __float_as_uint(f[3])};
  } else {
    return {pack<T>(f[0], f[1]), pack<T>(f[2], f[3]), pack<T>(f[4], f[5]), pack<T>(f[6], f[7])};
  }
}

}  // namespace torchtune_fused
