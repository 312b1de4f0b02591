// Sums of matrix products: checks on the tensors, and the launch.
#include <optional>
#include <string>
#include <vector>

#include "common/launch.h"
#include "common/torch_utils.h"
#include "mlp/mlp.h"
#include "rope/rope_tensors.h"

namespace torchtune_fused {
namespace {

bool is_dense(const Tensor& t) { return has_rows_of_16_bytes(t) && t.is_contiguous(); }

// Whether the kernel rotates the heads of all sums but the last: see rotate_heads.cuh.
bool can_rotate(const std::vector<Tensor>& seconds, const std::vector<int64_t>& terms, bool across,
                const Tensor& cos, const Tensor& sin, bool interleaved) {
  const auto *cosines = static_cast<const float*>(cos.const_data_ptr()),
             *sines = static_cast<const float*>(sin.const_data_ptr());
  const int64_t d = 2 * cos.size(1);
  if (across || terms.size() < 2 || (d != 64 && d != 128) ||
      cos.scalar_type() != ScalarType::Float || cos.stride(0) != sin.stride(0) ||
      cos.stride(1) != sin.stride(1) || cos.stride(1) != (interleaved ? 2 : 1) ||
      (interleaved && sines != cosines + 1) || cos.stride(0) % 2 != 0 ||
      reinterpret_cast<uintptr_t>(cosines) % 8 != 0 ||
      (!interleaved && reinterpret_cast<uintptr_t>(sines) % 8 != 0)) {
    return false;
  }
  size_t term = 0;
  for (size_t i = 0; i + 1 < terms.size(); ++i) {
    if (seconds[term].size(0) % d != 0) return false;
    term += terms[i];
  }
  return true;
}

int64_t columns_of(const Tensor& second, bool across) { return second.size(across ? 1 : 0); }

}  // namespace

// Whether the kernel takes these, whose shapes fit, and is faster than a product after another: it
// has one size of tiles, which has to occupy the GPU.
bool grouped_product_takes(std::vector<Tensor> firsts, std::vector<Tensor> seconds,
                           std::vector<int64_t> terms, bool across,
                           const std::optional<Tensor>& addend, const std::optional<Tensor>& cos,
                           const std::optional<Tensor>& sin, const std::optional<Tensor>&,
                           bool interleaved, int64_t) {
  const Tensor& first = firsts[0];
  const LaunchContext context(first);
  const ScalarType dtype = first.scalar_type();
  if (!runs_sm90_code() || (dtype != ScalarType::Half && dtype != ScalarType::BFloat16) ||
      firsts.size() > kMaxTerms || terms.size() > kMaxSums) {
    return false;
  }
  if (addend ? terms.size() > 1 || !is_dense(*addend) : firsts.size() < 2) return false;
  if (cos && !can_rotate(seconds, terms, across, *cos, *sin, interleaved)) return false;
  for (size_t i = 0; i < firsts.size(); ++i) {
    if (!has_rows_of_16_bytes(firsts[i]) || !is_dense(seconds[i]) || seconds[i].numel() == 0) {
      return false;
    }
  }
  const auto tiles = [](int64_t size) { return (size + kClusterTile - 1) / kClusterTile; };
  int64_t columns = 0;
  size_t term = 0;
  for (int64_t count : terms) {
    const int64_t n = columns_of(seconds[term], across);
    if (n % 8 != 0) return false;
    columns += tiles(n);
    term += count;
  }
  return tiles(first.size(0)) * columns >= device_properties().num_sms / 2;
}

std::vector<Tensor> grouped_product(std::vector<Tensor> firsts, std::vector<Tensor> seconds,
                                    std::vector<int64_t> terms, bool across,
                                    const std::optional<Tensor>& addend,
                                    const std::optional<Tensor>& cos,
                                    const std::optional<Tensor>& sin,
                                    const std::optional<Tensor>& input_pos, bool interleaved,
                                    int64_t steps) {
#ifdef TTF_HAS_SM90
  TTF_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  TTF_CHECK(grouped_product_takes(firsts, seconds, terms, across, addend, cos, sin, input_pos,
                                  interleaved, steps),
            "grouped_product has no kernel for this case");
  const Tensor& x = firsts[0];
  const LaunchContext context(x);
  const int64_t rows = x.size(0);
  GroupedProductParams p = {.sums = static_cast<int>(terms.size()),
                            .rows = static_cast<int>(rows),
                            .across = across,
                            .dtype = half_dtype(x, "firsts")};
  std::vector<Tensor> outs;
  int term = 0;
  for (int i = 0; i < p.sums; ++i) {
    const int64_t n = columns_of(seconds[term], across);
    outs.push_back(allocate(x, {rows, n}));
    p.outs[i] = outs[i].mutable_data_ptr();
    p.n[i] = static_cast<int>(n);
    p.term_ends[i] = term + static_cast<int>(terms[i]);
    for (; term < p.term_ends[i]; ++term) {
      const Tensor &first = firsts[term], &second = seconds[term];
      const int64_t k = first.size(1);
      check_device(first, "firsts", x);
      check_dtype(first, "firsts", x.scalar_type());
      check_shape(first, "firsts", {rows, k});
      check_like(second, "seconds", x, {across ? k : n, across ? n : k});
      p.terms[term] = {.first = first.const_data_ptr(),
                       .first_stride = first.stride(0),
                       .second = second.const_data_ptr(),
                       .k = static_cast<int>(k)};
    }
  }
  if (addend) {
    check_like(*addend, "addend", x, {rows, p.n[0]});
    p.addend = addend->const_data_ptr();
  }
  const std::optional<Tensor> positions = input_pos ? std::optional(dense(*input_pos)) : input_pos;
  if (cos) {
    TTF_CHECK(steps > 0 && rows % steps == 0, "rows must be a multiple of steps, got ", rows,
              " and ", steps);
    p.rope =
        rope_angles(x, rows / steps, steps, 2 * cos->size(1), *cos, *sin, positions, interleaved);
  }
  launch_grouped_product_sm90(p, context.stream());
  return outs;
#else
  raise("grouped_product has no kernel in this build, which is not for 9.0a");
#endif
}

}  // namespace torchtune_fused
