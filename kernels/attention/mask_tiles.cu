// A dense bool mask as bits, and what each of its tiles is: empty, full or partial.
//
// Grid: (groups of 8 tiles along the keys, tiles along the queries, batch * heads). A block of 8
// warps reads 64 rows of 512 bytes, 16 bytes a thread, 8 rows a warp, all loads before the first
// use: the mask is read once, and what is written is an eighth of it.
#include "attention/flash_attention.h"
#include "attention/mask_tiles.h"

namespace torchtune_fused {
namespace {

constexpr int kWarps = 8;
constexpr int kRowsPerWarp = kMaskTile / kWarps;
constexpr int kKeysPerThread = 16;
constexpr int kLanesPerTile = kMaskTile / kKeysPerThread;
constexpr int kTilesPerBlock = 32 / kLanesPerTile;

// The lowest bits of 4 bytes, side by side: no two products of the multiplication meet.
__device__ __forceinline__ uint32_t low_bits(uint32_t bytes) {
  return ((bytes & 0x01010101u) * 0x01020408u) >> 24 & 0xFu;
}

__device__ __forceinline__ uint4 load_bytes(const unsigned char* from, int count) {
  if (count == kKeysPerThread && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    return __ldcs(reinterpret_cast<const uint4*>(from));
  }
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kKeysPerThread; ++i) {
    if (i < count) words[i / 4] |= static_cast<uint32_t>(from[i]) << i % 4 * 8;
  }
  return {words[0], words[1], words[2], words[3]};
}

__global__ void __launch_bounds__(32 * kWarps) mask_tiles_kernel(MaskTilesParams p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tile_rows = gridDim.y, tile_columns = (p.keys + kMaskTile - 1) / kMaskTile;
  const int tile = blockIdx.x * kTilesPerBlock + lane / kLanesPerTile;
  const int first_key = (blockIdx.x * 32 + lane) * kKeysPerThread;
  const int keys = max(0, min(kKeysPerThread, p.keys - first_key));  // of this thread
  const int first_row = blockIdx.y * kMaskTile + warp * kRowsPerWarp;
  const int rows = max(0, min(kRowsPerWarp, p.queries - first_row));
  const unsigned char* mask = p.mask + blockIdx.z / p.heads * p.mask_stride[0] +
                              blockIdx.z % p.heads * p.mask_stride[1] +
                              first_row * p.mask_stride[2] + first_key;

  uint4 bytes[kRowsPerWarp];
#pragma unroll
  for (int row = 0; row < kRowsPerWarp; ++row) {
    bytes[row] = load_bytes(mask + row * p.mask_stride[2], row < rows ? keys : 0);
  }

  const int64_t words = 2 * tile_columns;
  uint32_t* bits = p.bits + (static_cast<int64_t>(blockIdx.z) * p.queries + first_row) * words +
                   first_key / 32;
  uint32_t any = 0, all = ~0u;
#pragma unroll
  for (int row = 0; row < kRowsPerWarp; ++row) {
    const uint32_t own = low_bits(bytes[row].x) | low_bits(bytes[row].y) << 4 |
                         low_bits(bytes[row].z) << 8 | low_bits(bytes[row].w) << 12;
    if (row < rows) {
      any |= own;
      all &= own;
    }
    const uint32_t word = own | __shfl_down_sync(~0u, own, 1) << 16;
    if (lane % 2 == 0 && row < rows && tile < tile_columns) bits[row * words] = word;
  }

  // Which of the four lanes of each tile saw a key that is visible, or one that is hidden.
  __shared__ uint32_t seen[kWarps], hidden[kWarps];
  const uint32_t inside = (1u << keys) - 1;
  const uint32_t lanes_seen = __ballot_sync(~0u, any != 0);
  const uint32_t lanes_hidden = __ballot_sync(~0u, (all & inside) != inside);
  if (lane == 0) {
    seen[warp] = lanes_seen;
    hidden[warp] = lanes_hidden;
  }
  __syncthreads();
  const int column = blockIdx.x * kTilesPerBlock + threadIdx.x;
  if (threadIdx.x >= kTilesPerBlock || column >= tile_columns) return;
  uint32_t any_seen = 0, any_hidden = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    any_seen |= seen[i];
    any_hidden |= hidden[i];
  }
  constexpr uint32_t kLanes = (1u << kLanesPerTile) - 1;
  const bool has_seen = any_seen >> threadIdx.x * kLanesPerTile & kLanes;
  const bool has_hidden = any_hidden >> threadIdx.x * kLanesPerTile & kLanes;
  p.kinds[(static_cast<int64_t>(blockIdx.z) * tile_rows + blockIdx.y) * tile_columns + column] =
      !has_seen ? kTileEmpty : has_hidden ? kTilePartial : kTileFull;
}

}  // namespace

void launch_mask_tiles(const MaskTilesParams& p, cudaStream_t stream) {
  const int tile_rows = (p.queries + kMaskTile - 1) / kMaskTile;
  const int tile_columns = (p.keys + kMaskTile - 1) / kMaskTile;
  const dim3 grid((tile_columns + kTilesPerBlock - 1) / kTilesPerBlock, tile_rows,
                  p.batch * p.heads);
  TTF_CHECK(grid.y < 65536 && grid.z < 65536, "the mask is too large: ", p.queries,
            " queries of ", p.batch * p.heads, " masks");
  mask_tiles_kernel<<<grid, 32 * kWarps, 0, stream>>>(p);
  TTF_CUDA_CHECK(cudaGetLastError());
}

}  // namespace torchtune_fused
