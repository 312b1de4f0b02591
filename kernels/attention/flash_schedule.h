// The order of the blocks of the attention kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda_utils.h"

namespace torchtune_fused {

// Blocks walk through sections of heads, so few that what they read over and over stays in L2; in a
// section the tiles go from those with the most work under a causal mask to those with the least,
// so that the last blocks of all are short; and neighbours are heads of the same tile.
struct Schedule {
  int heads, tiles, heads_per_section;

  // `granule` heads stay together; `bytes` is what one head reads repeatedly; `blocks_per_sm` run
  // at the same time, and a section has at least `waves` times as many.
  static Schedule make(int64_t heads, int tiles, int granule, int64_t bytes, int blocks_per_sm,
                       int waves = 4) {
    constexpr int64_t kL2Share = 24 << 20;
    const int64_t fill = waves * blocks_per_sm * device_properties().num_sms / tiles + 1;
    const int64_t least = std::max(kL2Share / std::max<int64_t>(bytes, 1), fill);
    const int64_t sections = std::max<int64_t>(heads / least, 1);
    int64_t section = (heads / granule + sections - 1) / sections * granule;
    // What is left for the last section must be 4/3 waves or more: fewer blocks start nearly at the
    // same time, and all SMs wait for the long ones among them.
    const int64_t enough = 4 * blocks_per_sm * device_properties().num_sms / (3 * tiles);
    while (section < heads && (heads - 1) % section + 1 < enough) section += granule;
    return {static_cast<int>(heads), tiles, static_cast<int>(section)};
  }
  unsigned blocks() const {
    const int64_t blocks = static_cast<int64_t>(heads) * tiles;
    TTF_CHECK(blocks < 1LL << 31, "too many heads and rows: ", blocks, " tiles");
    return static_cast<unsigned>(blocks);
  }
  // The same order as a grid, whose blocks need no divisions to find their places: heads of a
  // section, tiles, sections. Where the last section is shorter, heads beyond the last appear.
  dim3 grid() const {
    TTF_CHECK(tiles < 1 << 16, "too many rows: ", tiles, " tiles");
    return dim3(heads_per_section, tiles, (heads + heads_per_section - 1) / heads_per_section);
  }
  // The tile and the head of a block.
  __device__ __forceinline__ void locate(int block, int& tile, int& head) const {
    const int section = block / (heads_per_section * tiles);
    const int first = section * heads_per_section;
    const int in_section = min(heads_per_section, heads - first);
    const int at = block - first * tiles;
    tile = at / in_section;
    head = first + at % in_section;
  }
};

}  // namespace torchtune_fused
