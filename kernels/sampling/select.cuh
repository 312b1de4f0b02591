// Selection among candidates by one block: exact, whatever their number and distribution.
#pragma once

#include "sampling/rank.cuh"
#include "sampling/sampling.h"

namespace torchtune_fused {

template <int kThreads>
struct SelectShared {
  uint64_t of_warps[2][kThreads / 32];
  uint32_t low[kThreads];
  uint32_t high[kThreads];
  Crossing crossing;
};

// The rank at which the sum of measure(rank) over n > 0 candidates, in descending order of rank,
// reaches `target`; 0 if it never does. Ranks that differ only below kPrecision are equal, and what
// comes back is the smallest such rank.
//
// The range of ranks is cut into a bin for each thread, and the bin in which the sum crosses is the
// next range, until all in it are equal: three rounds as a rule, eight at worst.
template <int kThreads, uint64_t kPrecision, typename Measure>
__device__ uint64_t select(const Candidate* candidates, int n, uint64_t target,
                           SelectShared<kThreads>& s, Measure measure) {
  static_assert((kThreads & (kThreads - 1)) == 0, "bins are cut by shifting");
  uint64_t first = 0, last = ~0ull;
  while (true) {
    uint64_t extremes[2] = {};  // the largest rank, and the complement of the smallest
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint64_t rank = candidates[i].rank;
      if (rank < first || rank > last) continue;
      extremes[0] = max(extremes[0], rank);
      extremes[1] = max(extremes[1], ~rank);
    }
    block_max<kThreads>(extremes, s.of_warps);
    last = extremes[0], first = ~extremes[1];
    if (first / kPrecision == last / kPrecision) return first / kPrecision * kPrecision;
    const int shift = 64 - __clzll(static_cast<long long>((last - first) / kThreads));

    s.low[threadIdx.x] = s.high[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint64_t rank = candidates[i].rank;
      if (rank < first || rank > last) continue;
      const int bin = static_cast<int>((last - rank) >> shift);
      const uint64_t amount = measure(rank);
      // Shared memory adds 32 bits at a time: the carry goes by hand.
      const uint32_t low = static_cast<uint32_t>(amount);
      const uint32_t carry = atomicAdd(&s.low[bin], low) + low < low;
      const uint32_t high = static_cast<uint32_t>(amount >> 32) + carry;
      if (high != 0) atomicAdd(&s.high[bin], high);
    }
    __syncthreads();
    const uint64_t sums[1] = {static_cast<uint64_t>(s.high[threadIdx.x]) << 32 |
                              s.low[threadIdx.x]};
    const Scan scan = block_scan<kThreads>(sums[0], s.of_warps[0]);
    const Crossing crossing = find_crossing(sums, scan.before, target, &s.crossing);
    if (crossing.bin < 0) return 0;
    target -= crossing.before;
    last -= static_cast<uint64_t>(crossing.bin) << shift;
    const uint64_t width = (1ull << shift) - 1;
    if (last - first > width) first = last - width;
  }
}

}  // namespace torchtune_fused
