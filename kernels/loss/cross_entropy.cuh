// Cross-entropy of a row of logits and, written over them, its gradient.
//
// Grid: one block per row. Block: kThreads threads that stride over the row by 16-byte vectors.
// Memory: logits [rows, vocab], rows start at multiples of 16 bytes. The first pass over a row finds
// its log-sum-exp (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018) and
// keeps as much of the row in shared memory as there is; the second computes the gradient from that
// and, past its end, from logits that are still in L2.
#pragma once

#include "common/types.cuh"
#include "loss/loss.h"

namespace torchtune_fused {

constexpr int kThreads = 1024;
// The arithmetic for logits of type T.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kAhead = sizeof(T) == 8 ? 1 : 2;  // under way in a thread at once
  T values[kWidth];
};

// Streaming access: what is kept on the SM need not stay in L2.
template <typename T>
__device__ __forceinline__ Vector<T> load_once(const Vector<T>* address) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(address));
  return reinterpret_cast<const Vector<T>&>(bits);
}

template <typename T>
__device__ __forceinline__ void store_once(Vector<T>* address, const Vector<T>& v) {
  __stcs(reinterpret_cast<uint4*>(address), reinterpret_cast<const uint4&>(v));
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

// The largest of some values and the sum of their exponentials, relative to that value.
template <typename Acc>
struct LogSumExp {
  static constexpr Acc kLog2e = static_cast<Acc>(1.4426950408889634);
  Acc max = -INFINITY;
  Acc sum = 0;

  template <int N>
  __device__ __forceinline__ void add(const Acc (&x)[N]) {
    Acc largest = x[0];
#pragma unroll
    for (int k = 1; k < N; ++k) largest = fmax(largest, x[k]);
    if (largest > max) {
      sum *= exp2_of((max - largest) * kLog2e);
      max = largest;
    }
    const Acc shift = max == -INFINITY ? 0 : max * kLog2e;  // -inf - -inf is no number
#pragma unroll
    for (int k = 0; k < N; ++k) sum += exp2_of(fma(x[k], kLog2e, -shift));
  }

  __device__ __forceinline__ void merge(Acc other_max, Acc other_sum) {
    const Acc largest = fmax(max, other_max);
    const auto scaled = [largest](Acc m, Acc s) {
      return m == -INFINITY ? s : s * exp2_of((m - largest) * kLog2e);
    };
    sum = scaled(max, sum) + scaled(other_max, other_sum);
    max = largest;
  }

  __device__ __forceinline__ Acc value() const { return max + log(sum); }
};

// The same result in every thread, whatever the order in which warps arrive.
template <typename Acc>
__device__ __forceinline__ LogSumExp<Acc> merge_block(LogSumExp<Acc> mine) {
  __shared__ LogSumExp<Acc> partial[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    const Acc max = __shfl_xor_sync(~0u, mine.max, offset);
    mine.merge(max, __shfl_xor_sync(~0u, mine.sum, offset));
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = mine;
  __syncthreads();
  LogSumExp<Acc> all;
  for (int warp = 0; warp < kThreads / 32; ++warp) all.merge(partial[warp].max, partial[warp].sum);
  return all;
}

// cached: vectors of the row that fit into the dynamic shared memory.
template <typename T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, 1) cross_entropy_kernel(CrossEntropyParams p, int cached) {
  using Acc = AccOf<T>;
  constexpr int kWidth = Vector<T>::kWidth, kAhead = Vector<T>::kAhead;
  constexpr Acc kLog2e = LogSumExp<Acc>::kLog2e;
  extern __shared__ uint4 shared[];
  auto* cache = reinterpret_cast<Vector<T>*>(shared);

  const int64_t row = blockIdx.x;
  T* logits = static_cast<T*>(p.logits) + row * p.stride;
  auto* vectors = reinterpret_cast<Vector<T>*>(logits);
  const int num_vectors = static_cast<int>(p.vocab / kWidth);
  const int tail = num_vectors * kWidth + threadIdx.x;  // at most one more element a thread
  const int64_t target = p.targets[row];

  if (target == p.ignore_index) {
    if (p.backward) {
      for (int i = threadIdx.x; i < num_vectors; i += kThreads) store_once(vectors + i, Vector<T>{});
      if (tail < p.vocab) logits[tail] = T{};
    }
    if (threadIdx.x == 0) static_cast<Acc*>(p.losses)[row] = 0;
    return;
  }

  const Acc cap = static_cast<Acc>(p.softcap);
  const auto logit = [cap](T stored) {
    const Acc x = static_cast<Acc>(stored);
    return kSoftcap ? cap * tanh(x / cap) : x;
  };

  LogSumExp<Acc> lse;
  for (int first = threadIdx.x; first < num_vectors; first += kAhead * kThreads) {
    Vector<T> v[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u * kThreads;
      if (i < num_vectors) v[u] = i < cached ? load_once(vectors + i) : vectors[i];
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u * kThreads;
      if (i >= num_vectors) break;
      if (i < cached) cache[i] = v[u];
      Acc x[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x[k] = logit(v[u].values[k]);
      lse.add(x);
    }
  }
  if (tail < p.vocab) lse.add({logit(logits[tail])});
  // Read before anybody writes. What is no token has no loss: NaN shows it without a word to the host.
  const bool is_token = target >= 0 && target < p.vocab;
  const Acc at_target = is_token ? logit(logits[target]) : static_cast<Acc>(NAN);
  lse = merge_block(lse);

  const Acc z = lse.value(), z_loss = static_cast<Acc>(p.z_loss);
  if (threadIdx.x == 0) static_cast<Acc*>(p.losses)[row] = z - at_target + z_loss * z * z;
  if (!p.backward) return;

  // d loss / d x = softmax(x) * (1 + 2 * z_loss * z) - onehot, and d x / d stored = 1 - (x / cap)^2.
  const Acc upstream = p.grad ? static_cast<const Acc*>(p.grad)[row] : 1;
  const Acc scale = is_token ? upstream * (1 + 2 * z_loss * z) : static_cast<Acc>(NAN);
  const auto gradient = [&](T stored, bool is_target) {
    const Acc x = logit(stored);
    const Acc by_x = scale * exp2_of(fma(x, kLog2e, -z * kLog2e)) - (is_target ? upstream : 0);
    return static_cast<T>(kSoftcap ? by_x * (1 - (x / cap) * (x / cap)) : by_x);
  };
  for (int first = threadIdx.x; first < num_vectors; first += kAhead * kThreads) {
    Vector<T> v[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u * kThreads;
      if (i < num_vectors) v[u] = i < cached ? cache[i] : load_once(vectors + i);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u * kThreads;
      if (i >= num_vectors) break;
      const int64_t at = target - static_cast<int64_t>(i) * kWidth;
      if (at >= 0 && at < kWidth) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) v[u].values[k] = gradient(v[u].values[k], k == at);
      } else {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) v[u].values[k] = gradient(v[u].values[k], false);
      }
      store_once(vectors + i, v[u]);
    }
  }
  if (tail < p.vocab) logits[tail] = gradient(logits[tail], tail == target);
}

}  // namespace torchtune_fused
