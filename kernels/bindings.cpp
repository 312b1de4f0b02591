// Every op of the library, in one place.
//
// The schemas are defined in Python (torchtune_fused/ops), where each op also has its reference;
// this library adds CUDA implementations to them and nothing else, so it is loaded after
// `import torchtune_fused.ops`, and everything runs without it. One IMPL block only: registering
// a namespace twice crashes in the stable ABI.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/torch_utils.h"

namespace torchtune_fused {

// norm/norm.cpp
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps);

}  // namespace torchtune_fused

STABLE_TORCH_LIBRARY_IMPL(torchtune_fused, CUDA, m) {
  using namespace torchtune_fused;
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
}
