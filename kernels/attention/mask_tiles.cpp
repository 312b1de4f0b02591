// Masks as bits and tiles: checks on the tensor, and the launch.
#include "attention/mask_tiles.h"

#include <tuple>

#include "attention/flash_attention.h"
#include "common/torch_utils.h"

namespace torchtune_fused {

std::tuple<Tensor, Tensor> mask_tiles(const Tensor& mask) {
  TTF_CHECK(mask.dim() == 4, "mask must have shape [batch, heads, s, s_kv], got ",
            shape_string(mask));
  check_dtype(mask, "mask", ScalarType::Bool);
  const LaunchContext context(mask);
  const Tensor rows = mask.stride(3) == 1 ? mask : dense(mask);
  const int64_t batch = mask.size(0), heads = mask.size(1);
  const int64_t queries = mask.size(2), keys = mask.size(3);
  const int64_t row_tiles = (queries + kMaskTile - 1) / kMaskTile;
  const int64_t column_tiles = (keys + kMaskTile - 1) / kMaskTile;
  TTF_CHECK(queries < 1 << 30 && keys < 1 << 30, "mask is too large: ", shape_string(mask));

  Tensor kinds = allocate(mask, {batch, heads, row_tiles, column_tiles}, ScalarType::Byte);
  Tensor bits = allocate(mask, {batch, heads, queries, 2 * column_tiles}, ScalarType::Int);
  MaskTilesParams p = {};
  p.mask = static_cast<const unsigned char*>(rows.const_data_ptr());
  copy_strides(rows, p.mask_stride);
  p.kinds = static_cast<unsigned char*>(kinds.mutable_data_ptr());
  p.bits = static_cast<uint32_t*>(bits.mutable_data_ptr());
  p.batch = static_cast<int>(batch);
  p.heads = static_cast<int>(heads);
  p.queries = static_cast<int>(queries);
  p.keys = static_cast<int>(keys);
  if (mask.numel()) launch_mask_tiles(p, context.stream());
  return {kinds, bits};
}

}  // namespace torchtune_fused
