// AdamW: checks on the tensors, and the launches.
#include "optimizer/adamw.h"

#include <string>

#include "common/torch_utils.h"

namespace torchtune_fused {

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
    const int64_t size = params[i].numel();
    const auto check = [&](const Tensor& t, const char* list, ScalarType dtype, int64_t numel) {
      const std::string name = std::string(list) + "[" + std::to_string(i) + "]";
      check_device(t, name.c_str(), first);
      check_dtype(t, name.c_str(), dtype);
      check_contiguous(t, name.c_str());
      TTF_CHECK(t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
    };
    check(params[i], "params", first.scalar_type(), size);
    check(grads[i], "grads", first.scalar_type(), size);
    check(exp_avgs[i], "exp_avgs", first.scalar_type(), size);
    check(exp_avg_sqs[i], "exp_avg_sqs", first.scalar_type(), size);
    check(steps[i], "steps", ScalarType::Float, 1);
    launch.tensors.push_back({.param = params[i].mutable_data_ptr(),
                              .grad = grads[i].const_data_ptr(),
                              .exp_avg = exp_avgs[i].mutable_data_ptr(),
                              .exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr(),
                              .step = static_cast<const float*>(steps[i].const_data_ptr()),
                              .size = size});
  }
  const LaunchContext context(first);
  launch_adamw(launch, context.stream());
}

}  // namespace torchtune_fused
