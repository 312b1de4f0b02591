// Cross-entropy of a row of logits and, written over them, its gradient.
//
// Grid: one cluster of blocks per row, which share it; before 9.0, and for short rows, one block.
// Block: kThreads threads that stride over their block's share by 16-byte vectors.
// Memory: logits [rows, vocab], rows start at multiples of 16 bytes. The first pass over a share
// finds its log-sum-exp (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018)
// from a copy in shared memory; the second computes the gradient from that copy. What finds no room
// there is read twice, the second time out of L2 at best.
// A row is read, then waited for, then written. So that memory does not idle meanwhile, shares are
// small enough for an SM of 9.0 to hold those of several rows.
#pragma once

#include "common/cluster.cuh"
#include "common/ptx.cuh"
#include "common/types.cuh"
#include "loss/loss.h"

namespace torchtune_fused {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxCluster = 8;
// Blocks that an SM of 9.0 holds at once: tanh and fp64 take more registers.
template <typename T, bool kSoftcap>
constexpr int kBlocksPerSm = sizeof(T) == 8 ? 1 : kSoftcap ? 2 : 3;

// 16 bytes of logits of type T.
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

template <typename Acc>
__device__ __forceinline__ void merge_warp(LogSumExp<Acc>& mine) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const Acc max = __shfl_xor_sync(~0u, mine.max, offset);
    mine.merge(max, __shfl_xor_sync(~0u, mine.sum, offset));
  }
}

// The same result in every thread of the cluster, whatever the order in which its warps come here.
// `inbox` has a place for each of them in every block; blocks have arrived when theirs is open.
template <typename Acc>
__device__ __forceinline__ LogSumExp<Acc> merge_cluster(LogSumExp<Acc> mine,
                                                        LogSumExp<Acc>* inbox) {
  const int lane = threadIdx.x % 32, size = cluster_size();
  merge_warp(mine);
  cluster_wait();
  if (lane < size) {
    *in_block(inbox + cluster_rank() * kWarps + threadIdx.x / 32, lane) = mine;
  }
  __syncwarp();
  sync_cluster();
  LogSumExp<Acc> all;
  for (int i = lane; i < size * kWarps; i += 32) all.merge(inbox[i].max, inbox[i].sum);
  merge_warp(all);
  return all;
}

// Calls f(i, vector i) for this thread's vectors from `begin` to `end`, and loads kAhead of them
// before it uses the first.
template <typename T, typename Load, typename F>
__device__ __forceinline__ void for_vectors(int begin, int end, Load load, F f) {
  constexpr int kAhead = Vector<T>::kAhead;
  for (int first = begin + threadIdx.x; first < end; first += kAhead * kThreads) {
    Vector<T> v[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u * kThreads;
      if (i < end) v[u] = load(i);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int i = first + u * kThreads;
      if (i < end) f(i, v[u]);
    }
  }
}

// room: vectors that the dynamic shared memory has place for, before the inbox.
template <typename T, bool kSoftcap>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T, kSoftcap>)
    cross_entropy_kernel(const __grid_constant__ CrossEntropyParams p, int room) {
  launch_dependents();
  wait_for_grid();
  using Acc = AccOf<T>;
  constexpr int kWidth = Vector<T>::kWidth;
  constexpr Acc kLog2e = LogSumExp<Acc>::kLog2e;
  extern __shared__ uint4 shared[];
  auto* cache = reinterpret_cast<Vector<T>*>(shared);

  const int rank = cluster_rank(), size = cluster_size();
  const int64_t row = blockIdx.x / size;
  T* logits = static_cast<T*>(p.logits) + row * p.stride;
  const int row_vectors = static_cast<int>(p.vocab / kWidth);
  const int share = (row_vectors + size - 1) / size, begin = min(rank * share, row_vectors);
  const int num_vectors = min(share, row_vectors - begin), cached = min(num_vectors, room);
  auto* vectors = reinterpret_cast<Vector<T>*>(logits) + begin;
  // At most one more element a thread, in the last block.
  const int tail = row_vectors * kWidth + threadIdx.x;
  const bool has_tail = rank == size - 1 && tail < p.vocab;
  const int64_t target = p.targets[row];

  if (target == p.ignore_index) {
    if (p.backward) {
      for (int i = threadIdx.x; i < num_vectors; i += kThreads) {
        store_once(vectors + i, Vector<T>{});
      }
      if (has_tail) logits[tail] = T{};
    }
    if (rank == 0 && threadIdx.x == 0) static_cast<Acc*>(p.losses)[row] = 0;
    return;
  }
  cluster_arrive();
  // Each thread reads only what it has copied itself.
  for (int i = threadIdx.x; i < cached; i += kThreads) {
    copy_async_16(shared_address(cache + i), vectors + i, true);
  }
  copy_async_commit();

  const Acc cap = static_cast<Acc>(p.softcap);
  const auto logit = [cap](T stored) {
    const Acc x = static_cast<Acc>(stored);
    return kSoftcap ? cap * tanh(x / cap) : x;
  };
  const auto from_cache = [cache](int i) { return cache[i]; };

  // Read before anybody writes. The loss of what is no token is NaN: the host hears nothing of it.
  const bool is_token = target >= 0 && target < p.vocab;
  const Acc at_target = is_token ? logit(logits[target]) : static_cast<Acc>(NAN);
  LogSumExp<Acc> lse;
  const auto add = [&](int, const Vector<T>& v) {
    Acc x[kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x[k] = logit(v.values[k]);
    lse.add(x);
  };
  copy_async_wait<0>();
  for_vectors<T>(0, cached, from_cache, add);
  for_vectors<T>(cached, num_vectors, [vectors](int i) { return vectors[i]; }, add);
  if (has_tail) lse.add({logit(logits[tail])});
  lse = merge_cluster(lse, reinterpret_cast<LogSumExp<Acc>*>(cache + room));

  const Acc z = lse.value(), z_loss = static_cast<Acc>(p.z_loss);
  if (rank == 0 && threadIdx.x == 0) {
    static_cast<Acc*>(p.losses)[row] = z - at_target + z_loss * z * z;
  }
  if (!p.backward) return;

  // d loss / d x = softmax(x) (1 + 2 z_loss z) - onehot, and d x / d stored = 1 - (x / cap)^2.
  const Acc upstream = p.grad ? static_cast<const Acc*>(p.grad)[row] : 1;
  const Acc scale = is_token ? upstream * (1 + 2 * z_loss * z) : static_cast<Acc>(NAN);
  const auto gradient = [&](T stored, bool is_target) {
    const Acc x = logit(stored);
    const Acc by_x = scale * exp2_of(fma(x, kLog2e, -z * kLog2e)) - (is_target ? upstream : 0);
    return static_cast<T>(kSoftcap ? by_x * (1 - (x / cap) * (x / cap)) : by_x);
  };
  const auto replace = [&](int i, Vector<T>& v) {
    const int64_t at = target - static_cast<int64_t>(begin + i) * kWidth;
    if (at >= 0 && at < kWidth) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) v.values[k] = gradient(v.values[k], k == at);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) v.values[k] = gradient(v.values[k], false);
    }
    store_once(vectors + i, v);
  };
  for_vectors<T>(0, cached, from_cache, replace);
  for_vectors<T>(
      cached, num_vectors, [vectors](int i) { return load_once(vectors + i); }, replace);
  if (has_tail) logits[tail] = gradient(logits[tail], tail == target);
}

}  // namespace torchtune_fused
