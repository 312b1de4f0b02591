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
  int num_members;
  uint64_t members[32];  // of the range, if they are so few
};

// Few candidates lie in shared memory, and cost less than the instructions of an unrolled loop.
template <bool kFew>
constexpr int kUnroll = kFew ? 1 : 4;

// Of few members, each sums what is ahead of it, and the last one with less than `target` ahead is
// the answer. By whole warps.
template <uint64_t kPrecision, typename Measure>
__device__ uint64_t select_of_few(const uint64_t* members, int n, uint64_t target,
                                  Measure measure) {
  const int lane = threadIdx.x % 32;
  const uint64_t rank = lane < n ? members[lane] / kPrecision : 0;
  const uint64_t amount = lane < n ? measure(members[lane]) : 0;
  uint64_t ahead = 0;
  for (int i = 0; i < n; ++i) {
    const uint64_t other = __shfl_sync(~0u, rank, i), more = __shfl_sync(~0u, amount, i);
    if (other > rank) ahead += more;
  }
  return ~warp_max(lane < n && ahead < target ? ~(rank * kPrecision) : 0);
}

// The rank at which the sum of measure(rank) over n > 0 candidates, in descending order of their
// rank_at(i), reaches `target`; 0 if it never does. Ranks that differ only below kPrecision are
// equal, and what comes back is the smallest such rank.
//
// The range of ranks is cut into a bin for each thread, and the bin in which the sum crosses is the
// next range, until all in it are equal: three rounds as a rule, eight at worst. With kFew it ends
// where 32 are left, mostly after one; that pays if n is in the hundreds.
template <int kThreads, uint64_t kPrecision, bool kFew, typename Rank, typename Measure>
__device__ uint64_t select(int n, Rank rank_at, uint64_t target, SelectShared<kThreads>& s,
                           Measure measure) {
  static_assert((kThreads & (kThreads - 1)) == 0, "bins are cut by shifting");
  uint64_t first = 0, last = ~0ull;
  while (true) {
    uint64_t extremes[2] = {};  // the largest rank, and the complement of the smallest
#pragma unroll kUnroll<kFew>
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint64_t rank = rank_at(i);
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
#pragma unroll kUnroll<kFew>
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint64_t rank = rank_at(i);
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

    if constexpr (kFew) {
      if (threadIdx.x == 0) s.num_members = 0;
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < n; i += kThreads) {
        const uint64_t rank = rank_at(i);
        if (rank < first || rank > last) continue;
        const int at = atomicAdd(&s.num_members, 1);
        if (at < 32) s.members[at] = rank;
      }
      __syncthreads();
      if (s.num_members <= 32) {
        return select_of_few<kPrecision>(s.members, s.num_members, target, measure);
      }
    }
  }
}

// The rank from which top-p keeps candidates, of those from `first` on.
template <int kThreads, bool kFew, typename Rank>
__device__ uint64_t nucleus_from(const SampleParams& p, uint64_t first, int n, Rank rank_at,
                                 float largest, SelectShared<kThreads>& s) {
  const auto mass = [&](uint64_t rank) {
    return rank < first ? 0 : mass_of(largest - score_of(rank), p.inverse_temperature);
  };
  uint64_t sum = 0;
#pragma unroll kUnroll<kFew>
  for (int i = threadIdx.x; i < n; i += kThreads) sum += mass(rank_at(i));
  const uint64_t target = mass_to_keep(block_scan<kThreads>(sum, s.of_warps[0]).total, p.top_p);
  return max(first, select<kThreads, 1, kFew>(n, rank_at, target, s, mass));
}

// The rank from which both filters keep candidates; `remaining` of their tokens or, without top-k,
// of their mass are to be kept.
template <int kThreads, bool kFew, typename Rank>
__device__ uint64_t kept_from(const SampleParams& p, int n, Rank rank_at, uint64_t remaining,
                              float largest, SelectShared<kThreads>& s) {
  if (p.top_k == 0) {
    return select<kThreads, 1, kFew>(n, rank_at, remaining, s, [&](uint64_t rank) {
      return mass_of(largest - score_of(rank), p.inverse_temperature);
    });
  }
  const uint64_t kth = select<kThreads, 1ull << 32, kFew>(  // with its equals
      n, rank_at, remaining, s, [](uint64_t) -> uint64_t { return 1; });
  return p.top_p < 1 ? nucleus_from<kThreads, kFew>(p, kth, n, rank_at, largest, s) : kth;
}

// The best perturbed score of the candidates from a rank on.
template <int kThreads>
__device__ uint64_t best_from(uint64_t first, const Candidate* candidates, int n,
                              SelectShared<kThreads>& s) {
  uint64_t best[1] = {};
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (candidates[i].rank >= first) best[0] = max(best[0], candidates[i].drawn);
  }
  block_max<kThreads>(best, s.of_warps);
  return best[0];
}

}  // namespace torchtune_fused
