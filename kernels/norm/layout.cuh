// How rows are laid over the threads of a block.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "norm/norm.h"
#include "norm/rms_norm.cuh"

namespace torchtune_fused {

struct RowLayout {
  int threads_per_row;  // 0 if rows are not made of whole vectors, or are too long
  int block;

  unsigned blocks(int64_t rows) const {
    const int64_t rows_per_block = block / threads_per_row;
    return static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block);
  }
};

inline RowLayout row_layout(int64_t dim, DType dtype, std::initializer_list<const void*> pointers) {
  const RowLayout any = {.threads_per_row = 0, .block = kAnyBlock};
  const int vec_size = dtype == DType::kFloat32 ? 4 : 8;
  if (dtype == DType::kFloat64 || dim % vec_size != 0) return any;
  if (dim > int64_t{kMaxBlock} * kVectors * vec_size) return any;
  for (const void* pointer : pointers) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return any;
  }
  int threads = 1;
  while (threads * kVectors * vec_size < dim) threads *= 2;
  return {.threads_per_row = threads, .block = threads > kMinBlock ? threads : kMinBlock};
}

}  // namespace torchtune_fused
