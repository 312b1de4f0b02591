// AdamW: checks on the tensors, and the launches.
#include "optimizer/adamw.h"

#include <ostream>

#include "common/torch_utils.h"

namespace torchtune_fused {
namespace {

// The name of a list's tensor, not made into text unless a check fails: a model has hundreds of
// them, and steps often.
struct Element {
  const char* list;
  size_t i;
};

std::ostream& operator<<(std::ostream& out, const Element& element) {
  return out << element.list << "[" << element.i << "]";
}

}  // namespace

void adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
            std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> steps, double lr, double beta1,
            double beta2, double eps, double weight_decay, bool maximize) {
  const size_t count = params.size();
  TTF_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                steps.size() == count,
            "grads, exp_avgs, exp_avg_sqs and steps must be ", count, " as params are, got ",
            grads.size(), ", ", exp_avgs.size(), ", ", exp_avg_sqs.size(), " and ", steps.size());
  if (count == 0) return;
  const Tensor& first = params[0];
  TTF_CHECK(first.is_cuda(), "params[0] must be on a CUDA device, as another tensor is");
  AdamWParams launch = {.tensors = {},
                        .lr = lr,
                        .beta1 = beta1,
                        .beta2 = beta2,
                        .eps = eps,
                        .weight_decay = weight_decay,
                        .maximize = maximize,
                        .dtype = floating_dtype(first, "params[0]")};
  launch.tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const auto check = [&](const Tensor& t, const char* list) {
      const Element name = {list, i};
      check_device(t, name, first);
      check_dtype(t, name, first.scalar_type());
      check_contiguous(t, name);
      TTF_CHECK(t.sizes().equals(params[i].sizes()), name, " must have shape ",
                shape_string(params[i]), " as its parameter, got ", shape_string(t));
    };
    check(params[i], "params");
    check(grads[i], "grads");
    check(exp_avgs[i], "exp_avgs");
    check(exp_avg_sqs[i], "exp_avg_sqs");
    const Element step = {"steps", i};
    check_device(steps[i], step, first);
    check_dtype(steps[i], step, ScalarType::Float);
    TTF_CHECK(steps[i].numel() == 1, step, " must have one element, got ", shape_string(steps[i]));
    launch.tensors.push_back({.param = params[i].mutable_data_ptr(),
                              .grad = grads[i].const_data_ptr(),
                              .exp_avg = exp_avgs[i].mutable_data_ptr(),
                              .exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr(),
                              .step = static_cast<const float*>(steps[i].const_data_ptr()),
                              .size = params[i].numel()});
  }
  const LaunchContext context(first);
  launch_adamw(launch, context.stream());
}

}  // namespace torchtune_fused
