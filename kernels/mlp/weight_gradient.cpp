// Gradients of weights: checks on the tensors, and the launch.
#include <vector>

#include "common/launch.h"
#include "common/torch_utils.h"
#include "mlp/mlp.h"

namespace torchtune_fused {
namespace {

// How wide the kernel's tiles are to be, and how much of what it computes with them is wanted: all
// clusters take a tile at a time, so the last round may leave most of them idle.
struct Tiling {
  int columns = 0;
  double used = 0;

  Tiling(const std::vector<Tensor>& grads, const Tensor& x) {
    const int64_t k = x.size(1), clusters = device_properties().num_sms / 2;
    int64_t rows = 0, row_tiles = 0;
    for (const Tensor& grad : grads) {
      rows += grad.size(1);
      row_tiles += (grad.size(1) + kClusterTile - 1) / kClusterTile;
    }
    for (int width : {256, 192}) {
      const int64_t tiles = row_tiles * ((k + width - 1) / width);
      const int64_t rounds = (tiles + clusters - 1) / clusters;
      const double used_so = double(rows * k) / double(rounds * clusters * kClusterTile * width);
      if (used_so > used) columns = width, used = used_so;
    }
  }
};

// Of 0.97 the kernel is faster than cuBLAS, of 0.91 it is slower.
constexpr double kMinUsed = 0.95;

}  // namespace

// Whether the kernel takes these, whose shapes fit, and is faster than a product after another. Of
// a single layer it is not.
bool grouped_weight_gradients_takes(std::vector<Tensor> grads, const Tensor& x) {
  const LaunchContext context(x);
  const ScalarType dtype = x.scalar_type();
  if (!runs_sm90_code() || (dtype != ScalarType::Half && dtype != ScalarType::BFloat16) ||
      grads.size() < 2 || grads.size() > kMaxSums || x.numel() == 0 || !has_rows_of_16_bytes(x)) {
    return false;
  }
  for (const Tensor& grad : grads) {
    if (grad.numel() == 0 || !has_rows_of_16_bytes(grad)) return false;
  }
  return Tiling(grads, x).used >= kMinUsed;
}

std::vector<Tensor> grouped_weight_gradients(std::vector<Tensor> grads, const Tensor& x) {
#ifdef TTF_HAS_SM90
  TTF_CHECK(grouped_weight_gradients_takes(grads, x),
            "grouped_weight_gradients has no kernel for this case");
  const LaunchContext context(x);
  const int64_t tokens = x.size(0), k = x.size(1);
  WeightGradientParams p = {.x = x.const_data_ptr(),
                            .x_stride = x.stride(0),
                            .outputs = static_cast<int>(grads.size()),
                            .tokens = static_cast<int>(tokens),
                            .k = static_cast<int>(k),
                            .columns = Tiling(grads, x).columns,
                            .dtype = half_dtype(x, "x")};
  std::vector<Tensor> outs;
  for (int i = 0; i < p.outputs; ++i) {
    const Tensor& grad = grads[i];
    check_device(grad, "grads", x);
    check_dtype(grad, "grads", x.scalar_type());
    check_shape(grad, "grads", {tokens, -1});
    outs.push_back(allocate(x, {grad.size(1), k}));
    p.outs[i] = outs[i].mutable_data_ptr();
    p.grads[i] = grad.const_data_ptr();
    p.grad_strides[i] = grad.stride(0);
    p.n[i] = static_cast<int>(grad.size(1));
  }
  launch_weight_gradient_sm90(p, context.stream());
  return outs;
#else
  raise("grouped_weight_gradients has no kernel in this build, which is not for 9.0a");
#endif
}

}  // namespace torchtune_fused
