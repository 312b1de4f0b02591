// The gradient of an embedding, added to what its weight's gradient already holds.
//
// Grid: a block for each place in the order of the ids; those at which an id begins add up its
// tokens in their order, kAhead at a time, in fp32 and on top of what is there, and round once. The
// others end at once.
// Block: kThreads threads that stride over the dim by kWidth elements, 16 bytes where rows allow it.
// Memory: grad_weight [vocab, dim], grad [tokens, dim], both contiguous.
#include "embedding/embedding.h"

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/types.cuh"

namespace torchtune_fused {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 8;  // rows under way in a thread at once

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Elements {
  T values[kWidth];
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    embedding_add_kernel(const __grid_constant__ EmbeddingAddParams p) {
  wait_for_grid();
  using Acc = AccOf<T>;
  using Vector = Elements<T, kWidth>;
  const int64_t begin = blockIdx.x, id = p.ids[p.order[begin]];
  const auto is_of_id = [&](int64_t place) {
    return place < p.tokens && p.ids[p.order[place]] == id;
  };
  if (begin > 0 && is_of_id(begin - 1)) return;
  int64_t end = begin + 1;
  for (int found = kThreads; found == kThreads; end += found) {
    found = __syncthreads_count(is_of_id(end + threadIdx.x));
  }

  const int64_t vectors = p.dim / kWidth;
  Vector* sums = static_cast<Vector*>(p.grad_weight) + id * vectors;
  for (int64_t vector = threadIdx.x; vector < vectors; vector += kThreads) {
    const Vector* rows = static_cast<const Vector*>(p.grad) + vector;
    const Vector old = sums[vector];
    Acc sum[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] = static_cast<Acc>(old.values[i]);
    for (int64_t place = begin; place < end; place += kAhead) {
      Vector row[kAhead] = {};  // zeros past the end
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (place + j < end) row[j] = rows[p.order[place + j] * vectors];
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        Acc part = 0;  // so that a frequent id's sum is rounded less often
#pragma unroll
        for (int j = 0; j < kAhead; ++j) part += static_cast<Acc>(row[j].values[i]);
        sum[i] += part;
      }
    }
    Vector rounded;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) rounded.values[i] = static_cast<T>(sum[i]);
    sums[vector] = rounded;
  }
}

}  // namespace

void launch_embedding_add(const EmbeddingAddParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return;  // an empty grid is an error
  with_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = 16 / sizeof(T);
    const auto aligned = [](const void* data) {
      return reinterpret_cast<uintptr_t>(data) % 16 == 0;
    };
    const bool wide = p.dim % kWidth == 0 && aligned(p.grad_weight) && aligned(p.grad);
    const auto kernel = wide ? embedding_add_kernel<T, kWidth> : embedding_add_kernel<T, 1>;
    launch_waiting(kernel, static_cast<unsigned>(p.tokens), kThreads, 0, stream, p);
  });
}

}  // namespace torchtune_fused
