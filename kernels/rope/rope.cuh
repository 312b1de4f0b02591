// Rotary position embeddings of queries and keys, with an RMSNorm over each head or without.
//
// A pair (a, b) of channels becomes (a cos - b sin, b cos + a sin); norms are those of
// norm/rms_norm. Keys may go into a KV cache, and values with them, as they are. Grid: blocks for
// the queries, then for the keys, then for the values. Block: kWarps warps, each with one token at
// a time and all of its heads. A head takes `lanes` lanes of a warp (a power of two), of which each
// holds kPairs pairs: kVec channels from the first half of the head and kVec from the second, as
// 16-byte vectors; or, where d or the strides don't allow vectors, pair by pair. Angles of a
// block's tokens and the norm's weight are staged in shared memory.
#pragma once

#include "common/types.cuh"
#include "common/vec.cuh"
#include "rope/angles.cuh"

namespace torchtune_fused {

constexpr int kWarps = 4;
constexpr int kPairs = 8;

template <typename Acc>
struct Pairs {
  Acc a[kPairs], b[kPairs];
};

// Which pairs of a head this lane holds. kVec: channels in a vector, or 1.
template <int kVec>
struct Slice {
  int half, chunks, lane, lanes;
  bool interleaved;

  // Calls f(c, i) for every chunk c of this lane, the i-th of the head.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int c = 0; c < kPairs / kVec; ++c) {
      const int i = lane + c * lanes;
      if (i < chunks) f(c, i);
    }
  }

  // The pair's place among the d / 2 angles; j counts the pairs of a chunk.
  __device__ __forceinline__ int angle(int i, int j) const {
    if (kVec == 1 || !interleaved) return i * kVec + j;
    return j < kVec / 2 ? i * (kVec / 2) + j : half / 2 + i * (kVec / 2) + j - kVec / 2;
  }
};

template <int kVec, typename T, typename Acc>
__device__ __forceinline__ void read(const T* data, Acc (&v)[kVec]) {
  constexpr int kSize = kVecSize<T>;
  if constexpr (kVec % kSize == 0) {
#pragma unroll
    for (int k = 0; k < kVec; k += kSize) {
      float part[kSize];
      unpack_vec<T>(*reinterpret_cast<const uint4*>(data + k), part);
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[k + j] = part[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = static_cast<Acc>(data[j]);
  }
}

template <int kVec, typename T, typename Acc>
__device__ __forceinline__ void write(T* data, const Acc (&v)[kVec]) {
  constexpr int kSize = kVecSize<T>;
  if constexpr (kVec % kSize == 0) {
#pragma unroll
    for (int k = 0; k < kVec; k += kSize) {
      float part[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) part[j] = v[k + j];
      *reinterpret_cast<uint4*>(data + k) = pack_vec<T>(part);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) data[j] = static_cast<T>(v[j]);
  }
}

// The pairs of one head, zeros where this lane has none.
template <int kVec, typename T, typename Acc>
__device__ __forceinline__ Pairs<Acc> load_pairs(const Slice<kVec>& slice, const T* head) {
  Pairs<Acc> p = {};
  slice.each([&](int c, int i) {
    if constexpr (kVec == 1) {
      const int first = slice.interleaved ? 2 * i : i;
      p.a[c] = static_cast<Acc>(head[first]);
      p.b[c] = static_cast<Acc>(head[first + (slice.interleaved ? 1 : slice.half)]);
    } else {
      Acc low[kVec], high[kVec];
      read<kVec>(head + i * kVec, low);
      read<kVec>(head + slice.half + i * kVec, high);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const int k = 2 * j % kVec;
        const Acc* vector = j < kVec / 2 ? low : high;
        p.a[c * kVec + j] = slice.interleaved ? vector[k] : low[j];
        p.b[c * kVec + j] = slice.interleaved ? vector[k + 1] : high[j];
      }
    }
  });
  return p;
}

template <int kVec, typename T, typename Acc>
__device__ __forceinline__ void store_pairs(const Slice<kVec>& slice, const Pairs<Acc>& p,
                                            T* head) {
  slice.each([&](int c, int i) {
    if constexpr (kVec == 1) {
      const int first = slice.interleaved ? 2 * i : i;
      head[first] = static_cast<T>(p.a[c]);
      head[first + (slice.interleaved ? 1 : slice.half)] = static_cast<T>(p.b[c]);
    } else {
      Acc low[kVec], high[kVec];
#pragma unroll
      for (int j = 0; j < kVec / 2; ++j) {
        const int k = c * kVec + j;
        const bool paired = slice.interleaved;
        low[2 * j] = paired ? p.a[k] : p.a[c * kVec + 2 * j];
        low[2 * j + 1] = paired ? p.b[k] : p.a[c * kVec + 2 * j + 1];
        high[2 * j] = paired ? p.a[k + kVec / 2] : p.b[c * kVec + 2 * j];
        high[2 * j + 1] = paired ? p.b[k + kVec / 2] : p.b[c * kVec + 2 * j + 1];
      }
      write<kVec>(head + i * kVec, low);
      write<kVec>(head + slice.half + i * kVec, high);
    }
  });
}

// Cosines as a, sines as b.
template <typename Acc>
__device__ __forceinline__ Pairs<Acc> rotated(const Pairs<Acc>& p, const Pairs<Acc>& angles,
                                              Acc sign) {
  Pairs<Acc> out;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const Acc sine = sign * angles.b[j];
    out.a[j] = p.a[j] * angles.a[j] - p.b[j] * sine;
    out.b[j] = p.b[j] * angles.a[j] + p.a[j] * sine;
  }
  return out;
}

// The sum over the lanes of a head.
template <typename Acc>
__device__ __forceinline__ Acc head_sum(Acc value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(~0u, value, offset);
  }
  return value;
}

template <typename Acc>
__device__ __forceinline__ Acc dot(const Pairs<Acc>& p, const Pairs<Acc>& q) {
  Acc sum = 0;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) sum += p.a[j] * q.a[j] + p.b[j] * q.b[j];
  return sum;
}

template <typename Acc>
__device__ __forceinline__ Acc reciprocal_rms(const Pairs<Acc>& p, int lanes, const RopeParams& r) {
  const Acc sum = head_sum(dot(p, p), lanes);
  return rsqrt(sum / static_cast<Acc>(r.head_dim) + static_cast<Acc>(r.eps));
}

// What the warps of a block share.
template <typename Acc>
struct alignas(16) Staged {
  Acc cos[kWarps][kRopeMaxHeadDim / 2];
  Acc sin[kWarps][kRopeMaxHeadDim / 2];
  Acc norm[kRopeMaxHeadDim];
};

// The angles of this warp's token.
template <typename Acc>
__device__ __forceinline__ void stage_angles(const RopeParams& p, int64_t token, Acc* cos,
                                             Acc* sin) {
  __syncwarp();
  if (token < p.tokens) {
    const int64_t position = position_of(p, token / p.steps, token % p.steps);
    for (int i = threadIdx.x % 32; i < p.head_dim / 2; i += 32) {
      load_angle(p, position, i, cos[i], sin[i]);
    }
  }
  __syncwarp();
}

template <int kVec, typename Acc>
__device__ __forceinline__ Pairs<Acc> staged_angles(const Slice<kVec>& slice, const Acc* cos,
                                                    const Acc* sin) {
  Pairs<Acc> angles = {};
  slice.each([&](int c, int i) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      angles.a[c * kVec + j] = cos[slice.angle(i, j)];
      angles.b[c * kVec + j] = sin[slice.angle(i, j)];
    }
  });
  return angles;
}

template <typename Acc>
__device__ __forceinline__ void stage_norm(const RopeParams& p, const RopeHeads& heads, Acc* norm) {
  if (heads.norm == nullptr) return;
  for (int i = threadIdx.x; i < p.head_dim; i += 32 * kWarps) {
    norm[i] = load_element<Acc>(heads.norm, i, heads.norm_dtype);
  }
  __syncthreads();
}

template <int kVec>
__device__ __forceinline__ Slice<kVec> slice_of(const RopeParams& p) {
  const int half = p.head_dim / 2, chunks = half / kVec;
  int lanes = 1;
  while (lanes < 32 && lanes < chunks) lanes *= 2;
  return {half, chunks, static_cast<int>(threadIdx.x) % lanes, lanes, p.interleaved};
}

// Where a head of a token is.
__device__ __forceinline__ int64_t offset_of(const int64_t (&stride)[3], int64_t token, int steps,
                                             int head) {
  return token / steps * stride[0] + token % steps * stride[1] + head * stride[2];
}

template <typename T, int kVec>
__global__ void __launch_bounds__(32 * kWarps) rope_kernel(const __grid_constant__ RopeParams p) {
  using Acc = AccOf<T>;
  __shared__ Staged<Acc> staged;
  int part = 0, block = blockIdx.x;
  for (; block >= p.of[part].blocks; ++part) block -= p.of[part].blocks;
  const RopeHeads& heads = p.of[part];
  const int warp = threadIdx.x / 32;
  stage_norm(p, heads, staged.norm);
  const int64_t token = int64_t{block} * kWarps + warp;
  if (!heads.as_they_are) stage_angles(p, token, staged.cos[warp], staged.sin[warp]);
  if (token >= p.tokens) return;
  const int64_t filled = heads.cached ? *p.cache_pos : 0;
  if (heads.cached && filled + token % p.steps >= p.cache_len) return;  // see advance_kernel

  const Slice<kVec> slice = slice_of<kVec>(p);
  Pairs<Acc> angles = {};
  if (!heads.as_they_are) angles = staged_angles(slice, staged.cos[warp], staged.sin[warp]);
  const Acc sign = p.inverse ? -1 : 1;
  const int at_once = 32 / slice.lanes;
  const T* x = static_cast<const T*>(heads.x) + offset_of(heads.stride, token, p.steps, 0);
  T* out = static_cast<T*>(heads.out) + offset_of(heads.out_stride, token, p.steps, 0) +
           filled * heads.out_stride[1];
  // Lanes without a head take part in the sums of the others' norms.
  for (int first = 0; first < heads.heads; first += at_once) {
    const int head = first + threadIdx.x % 32 / slice.lanes;
    const bool valid = head < heads.heads;
    Pairs<Acc> values = {};
    if (valid) values = load_pairs<kVec, T, Acc>(slice, x + head * heads.stride[2]);
    if (heads.as_they_are) {
      // nothing to do
    } else if (heads.norm == nullptr) {
      values = rotated(values, angles, sign);
    } else {
      const Acc rstd = reciprocal_rms(values, slice.lanes, p);  // turning keeps the norm
      const Pairs<Acc> weight = load_pairs<kVec, Acc, Acc>(slice, staged.norm);
      if (!p.norm_before_rope) values = rotated(values, angles, sign);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        values.a[j] *= rstd * weight.a[j];
        values.b[j] *= rstd * weight.b[j];
      }
      if (p.norm_before_rope) values = rotated(values, angles, sign);
    }
    if (valid) store_pairs(slice, values, out + head * heads.out_stride[2]);
  }
}

}  // namespace torchtune_fused
