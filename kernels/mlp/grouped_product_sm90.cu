#include "mlp/grouped_product.cuh"

#include "mlp/matrix_map.h"

namespace torchtune_fused {
namespace {

template <typename T, bool kAcrossK>
void launch(const GroupedProductParams& p, cudaStream_t stream) {
  GroupedProductMaps maps;
  GroupedProductShape shape = {.rows = p.rows,
                               .outputs = p.sums,
                               .rotated = p.rope.cos != nullptr ? p.sums - 1 : 0,
                               .adds = p.addend != nullptr};
  int columns = 0;
  for (int i = 0, term = 0; i < p.sums; ++i) {
    const int n = p.n[i];
    columns += (n + kWidth - 1) / kWidth;
    shape.column_ends[i] = columns;
    shape.term_ends[i] = p.term_ends[i];
    maps.out[i] = matrix_map(p.outs[i], p.rows, n, 64, p.dtype);
    for (; term < p.term_ends[i]; ++term) {
      const ProductTerm& t = p.terms[term];
      maps.first[term] = matrix_map(t.first, p.rows, t.k, kRows, p.dtype, t.first_stride);
      maps.second[term] = kAcrossK ? matrix_map(t.second, t.k, n, 64, p.dtype)
                                   : matrix_map(t.second, n, t.k, kWidth / 2, p.dtype);
      shape.steps[term] = steps_of(t.k);
    }
  }
  if (shape.adds) maps.addend = matrix_map(p.addend, p.rows, p.n[0], kRows, p.dtype);
  launch_product(grouped_product_kernel<T, kAcrossK>, kGroupedSharedBytes, stream, maps, shape,
                 p.rope);
}

template <typename T>
void launch(const GroupedProductParams& p, cudaStream_t stream) {
  if (p.across) {
    launch<T, true>(p, stream);
  } else {
    launch<T, false>(p, stream);
  }
}

}  // namespace

void launch_grouped_product_sm90(const GroupedProductParams& p, cudaStream_t stream) {
  if (p.dtype == DType::kFloat16) {
    launch<__half>(p, stream);
  } else {
    launch<__nv_bfloat16>(p, stream);
  }
}

}  // namespace torchtune_fused
