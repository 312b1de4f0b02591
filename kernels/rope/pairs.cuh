// The pairs of channels of a head that a lane of a warp works on.
//
// A head takes `1 << lane_bits` lanes, of which each holds kPairs pairs: kVec channels from the
// first half of the head and kVec from the second, as 16-byte vectors; or, where d or the strides
// don't allow vectors, pair by pair (kVec 1). Angles and the norm's weight, two numbers a pair, are
// staged in shared memory.
#pragma once

#include "common/types.cuh"
#include "common/vec.cuh"
#include "rope/angles.cuh"

namespace torchtune_fused {

constexpr int kWarps = 4;  // of a block
constexpr int kPairs = 8;

template <typename Acc>
struct Pairs {
  Acc a[kPairs], b[kPairs];
};

// The same as it lies in memory, in chunks of kVec pairs: a vector from each half of the head. With
// pairs of two halves, that is the first elements and the second ones; else see `regroup`.
template <typename T, int kVec>
struct Packed {
  using Chunk = std::conditional_t<kVec == 1, T, uint4>;
  Chunk a[kPairs / kVec], b[kPairs / kVec];
};

// Which pairs of a head this lane holds. kVec: channels in a vector, or 1.
template <int kVec>
struct Slice {
  int half, lane, lanes;
  bool interleaved;

  // Calls f(c, i) for every chunk c of this lane, the i-th of the head.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
#pragma unroll
    for (int c = 0; c < kPairs / kVec; ++c) {
      const int i = lane + c * lanes;
      if (i * kVec < half) f(c, i);
    }
  }

  // The place of the chunk's j-th pair among the d / 2 of the head.
  __device__ __forceinline__ int pair(int i, int j) const {
    if (kVec == 1 || !interleaved) return i * kVec + j;
    return (j < kVec / 2 ? 0 : half / 2 - kVec / 2) + i * (kVec / 2) + j;
  }

  // Where in the head the two parts of the i-th chunk are.
  __device__ __forceinline__ int low(int i) const {
    return kVec == 1 && interleaved ? 2 * i : i * kVec;
  }
  __device__ __forceinline__ int high(int i) const {
    return kVec == 1 && interleaved ? 2 * i + 1 : half + i * kVec;
  }
};

template <int kVec>
__device__ __forceinline__ Slice<kVec> slice_of(const RopeParams& p) {
  const int lanes = 1 << p.lane_bits;
  return {p.head_dim / 2, static_cast<int>(threadIdx.x) & (lanes - 1), lanes, p.interleaved};
}

// Of interleaved pairs, from how they lie in memory, side by side, to the first elements and the
// second ones; or back.
template <typename T, bool kToPairs>
__device__ __forceinline__ void regroup(uint4& a, uint4& b) {
  const uint4 x = a, y = b;
  if constexpr (sizeof(T) == 4) {
    a = kToPairs ? uint4{x.x, x.z, y.x, y.z} : uint4{x.x, y.x, x.y, y.y};
    b = kToPairs ? uint4{x.y, x.w, y.y, y.w} : uint4{x.z, y.z, x.w, y.w};
  } else {
    const auto low = [](uint32_t p, uint32_t q) { return __byte_perm(p, q, 0x5410); };
    const auto high = [](uint32_t p, uint32_t q) { return __byte_perm(p, q, 0x7632); };
    if (kToPairs) {
      a = {low(x.x, x.y), low(x.z, x.w), low(y.x, y.y), low(y.z, y.w)};
      b = {high(x.x, x.y), high(x.z, x.w), high(y.x, y.y), high(y.z, y.w)};
    } else {
      a = {low(x.x, y.x), high(x.x, y.x), low(x.y, y.y), high(x.y, y.y)};
      b = {low(x.z, y.z), high(x.z, y.z), low(x.w, y.w), high(x.w, y.w)};
    }
  }
}

// Zeros where this lane has no part of the head. Heads stream by: both hints together let reads and
// writes of memory disturb each other less (PERFORMANCE.md of the norms).
template <typename T, int kVec>
__device__ __forceinline__ Packed<T, kVec> load_packed(const Slice<kVec>& slice, const T* head) {
  using Chunk = typename Packed<T, kVec>::Chunk;
  Packed<T, kVec> p = {};
  slice.each([&](int c, int i) {
    p.a[c] = __ldcs(reinterpret_cast<const Chunk*>(head + slice.low(i)));
    p.b[c] = __ldcs(reinterpret_cast<const Chunk*>(head + slice.high(i)));
  });
  return p;
}

template <typename T, int kVec>
__device__ __forceinline__ void store_packed(const Slice<kVec>& slice, const Packed<T, kVec>& p,
                                             T* head) {
  using Chunk = typename Packed<T, kVec>::Chunk;
  slice.each([&](int c, int i) {
    __stcs(reinterpret_cast<Chunk*>(head + slice.low(i)), p.a[c]);
    __stcs(reinterpret_cast<Chunk*>(head + slice.high(i)), p.b[c]);
  });
}

template <typename T, int kVec>
__device__ __forceinline__ Pairs<AccOf<T>> unpacked(Packed<T, kVec> p, bool interleaved) {
  Pairs<AccOf<T>> out;
#pragma unroll
  for (int c = 0; c < kPairs / kVec; ++c) {
    if constexpr (kVec == 1) {
      out.a[c] = static_cast<AccOf<T>>(p.a[c]);
      out.b[c] = static_cast<AccOf<T>>(p.b[c]);
    } else {
      if (interleaved) regroup<T, true>(p.a[c], p.b[c]);
      unpack_vec<T>(p.a[c], reinterpret_cast<float(&)[kVec]>(out.a[c * kVec]));
      unpack_vec<T>(p.b[c], reinterpret_cast<float(&)[kVec]>(out.b[c * kVec]));
    }
  }
  return out;
}

template <typename T, int kVec>
__device__ __forceinline__ Packed<T, kVec> packed(const Pairs<AccOf<T>>& p, bool interleaved) {
  Packed<T, kVec> out;
#pragma unroll
  for (int c = 0; c < kPairs / kVec; ++c) {
    if constexpr (kVec == 1) {
      out.a[c] = static_cast<T>(p.a[c]);
      out.b[c] = static_cast<T>(p.b[c]);
    } else {
      out.a[c] = pack_vec<T>(reinterpret_cast<const float(&)[kVec]>(p.a[c * kVec]));
      out.b[c] = pack_vec<T>(reinterpret_cast<const float(&)[kVec]>(p.b[c * kVec]));
      if (interleaved) regroup<T, false>(out.a[c], out.b[c]);
    }
  }
  return out;
}

// Cosines as a, sines as b. A sign of -1 turns by the opposite angles.
template <typename Acc>
__device__ __forceinline__ Pairs<Acc> rotated(const Pairs<Acc>& p, const Pairs<Acc>& angles,
                                              Acc sign = 1) {
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

// What the warps of a block share: two numbers for each of the d / 2 pairs of a head.
template <typename Acc>
struct alignas(16) Staged {
  Acc cos[kWarps][kRopeMaxHeadDim / 2], sin[kWarps][kRopeMaxHeadDim / 2];
  Acc norm_a[kRopeMaxHeadDim / 2], norm_b[kRopeMaxHeadDim / 2];  // the weights of pairs
};

template <typename Acc>
__device__ __forceinline__ void stage_norm(const RopeParams& p, const RopeHeads& heads,
                                           Staged<Acc>& staged) {
  if (heads.norm == nullptr) return;
  const int half = p.head_dim / 2;
  for (int i = threadIdx.x; i < half; i += 32 * kWarps) {
    Acc pair[2];
    load_elements(heads.norm, {p.interleaved ? 2 * i : i, p.interleaved ? 2 * i + 1 : i + half},
                  heads.norm_dtype, pair);
    staged.norm_a[i] = pair[0];
    staged.norm_b[i] = pair[1];
  }
  __syncthreads();
}

// Puts the angles of a token where the lanes of its warp find theirs.
template <typename Acc>
__device__ __forceinline__ void stage_angles(const RopeParams& p, int64_t position, Acc* cos,
                                             Acc* sin) {
  __syncwarp();
  const int half = p.head_dim / 2;
  constexpr int kAtOnce = 2;  // a head of 128 channels waits for memory once
  for (int first = threadIdx.x % 32; first < half; first += 32 * kAtOnce) {
    int angle[kAtOnce];
    Acc cosines[kAtOnce], sines[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) angle[n] = min(first + 32 * n, half - 1);
    load_angles(p, position, angle, cosines, sines);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      if (first + 32 * n >= half) break;
      cos[angle[n]] = cosines[n];
      sin[angle[n]] = p.inverse ? -sines[n] : sines[n];
    }
  }
  __syncwarp();
}

template <int kSize, typename Acc>
__device__ __forceinline__ void copy_vector(const Acc* from, Acc* to) {
  struct alignas(kSize * sizeof(Acc) < 16 ? kSize * sizeof(Acc) : 16) Vector { Acc v[kSize]; };
  const Vector vector = *reinterpret_cast<const Vector*>(from);
#pragma unroll
  for (int j = 0; j < kSize; ++j) to[j] = vector.v[j];
}

// This lane's part of what is staged.
template <int kVec, typename Acc>
__device__ __forceinline__ Pairs<Acc> staged_pairs(const Slice<kVec>& slice, const Acc* a,
                                                   const Acc* b) {
  Pairs<Acc> out = {};
  slice.each([&](int c, int i) {
    if constexpr (kVec == 1) {
      out.a[c] = a[i];
      out.b[c] = b[i];
    } else {
      constexpr int kPart = kVec / 2;
#pragma unroll
      for (int j = 0; j < kVec; j += kPart) {
        copy_vector<kPart>(a + slice.pair(i, j), out.a + c * kVec + j);
        copy_vector<kPart>(b + slice.pair(i, j), out.b + c * kVec + j);
      }
    }
  });
  return out;
}

}  // namespace torchtune_fused
