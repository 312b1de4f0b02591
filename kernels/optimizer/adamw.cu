// A step of AdamW over many tensors: four are read, three written, at the speed of a copy.
//
// Grid: a block for each chunk of a tensor, one vector of 16 bytes a thread. It finds its tensor
// among those of the launch, which are as many as the kernel's parameters have room for.
// Memory: what is left of a tensor after its last whole vector, and all of one that does not start
// at a multiple of 16 bytes in each of its four places, goes element by element.
// Arithmetic: fp32, or fp64 for fp64 tensors; each result is rounded once.
#include "optimizer/adamw.h"

#include <cmath>

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/types.cuh"

namespace torchtune_fused {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxTensors = 72;

template <typename T>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / sizeof(T);
  T values[kWidth];
};

template <typename T>
constexpr int kChunk = kThreads * Vector<T>::kWidth;  // elements of a block

// The tensors of a launch, and what is the same for all their elements.
template <typename Acc>
struct Batch {
  AdamWTensor tensors[kMaxTensors];
  int32_t first_blocks[kMaxTensors];
  int num_tensors;
  Acc lr, eps, log_beta1, log_beta2;
  Acc param_share;                // lr * weight_decay
  Acc exp_avg_share, grad_share;  // 1 - beta1, and that with the sign of the direction
  Acc exp_avg_sq_share;           // 1 - beta2
};
static_assert(sizeof(Batch<double>) <= 4096, "a kernel's parameters must fit into 4 KB");

// Roots and quotients of fp32 to 2 units in the last place: the exact ones take a branch for what is
// very small or large, and among 32 elements one often is.
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ double quotient(double x, double y) { return x / y; }
__device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ float root(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The step of one element of a tensor.
template <typename Acc>
class Step {
 public:
  // 1 - beta ** number, without the cancellation that would leave few digits of the first ones.
  __device__ Step(const Batch<Acc>& batch, Acc number)
      : batch_(batch),
        step_size_(batch.lr / -expm1(number * batch.log_beta1)),
        root_scale_(1 / sqrt(-expm1(number * batch.log_beta2))) {}

  template <typename T>
  __device__ void operator()(T& param, T grad, T& exp_avg, T& exp_avg_sq) const {
    const Acc p = param, g = grad;
    const Acc m = fma(batch_.grad_share, g, decayed(exp_avg, batch_.exp_avg_share));
    const Acc v = fma(batch_.exp_avg_sq_share * g, g, decayed(exp_avg_sq, batch_.exp_avg_sq_share));
    const Acc direction = quotient(m, fma(root(v), root_scale_, batch_.eps));
    param = static_cast<T>(p - fma(batch_.param_share, p, step_size_ * direction));
    exp_avg = static_cast<T>(m);
    exp_avg_sq = static_cast<T>(v);
  }

 private:
  // x * beta, from 1 - beta: rounded itself, a beta near 1 would be another, step after step.
  static __device__ Acc decayed(Acc x, Acc share) { return isinf(x) ? x : fma(-share, x, x); }

  const Batch<Acc>& batch_;
  Acc step_size_, root_scale_;  // with the corrections of the moments' bias
};

__device__ __forceinline__ bool is_aligned(const AdamWTensor& t) {
  const auto bits = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
  return (bits(t.param) | bits(t.grad) | bits(t.exp_avg) | bits(t.exp_avg_sq)) % 16 == 0;
}

template <typename T>
__device__ __forceinline__ Vector<T>& vector(T* data, int i) {
  return reinterpret_cast<Vector<T>*>(data)[i];
}

template <typename T>
__device__ __forceinline__ const Vector<T>& vector(const T* data, int i) {
  return reinterpret_cast<const Vector<T>*>(data)[i];
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const __grid_constant__ Batch<AccOf<T>> batch) {
  wait_for_grid();
  constexpr int kWidth = Vector<T>::kWidth;
  const int block = blockIdx.x;
  int low = 0, high = batch.num_tensors;  // the block's tensor is from low on, and before high
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.first_blocks[middle] <= block ? low : high) = middle;
  }
  const AdamWTensor& tensor = batch.tensors[low];
  const int64_t begin = static_cast<int64_t>(block - batch.first_blocks[low]) * kChunk<T>;
  const int size = static_cast<int>(min(tensor.size - begin, static_cast<int64_t>(kChunk<T>)));
  T* params = static_cast<T*>(tensor.param) + begin;
  const T* grads = static_cast<const T*>(tensor.grad) + begin;
  T* exp_avgs = static_cast<T*>(tensor.exp_avg) + begin;
  T* exp_avg_sqs = static_cast<T*>(tensor.exp_avg_sq) + begin;
  const Step<AccOf<T>> step(batch, *tensor.step);

  const int vectors = is_aligned(tensor) ? size / kWidth : 0, i = threadIdx.x;
  if (i < vectors) {
    Vector<T> p = vector(params, i), m = vector(exp_avgs, i), v = vector(exp_avg_sqs, i);
    const Vector<T> g = vector(grads, i);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) step(p.values[k], g.values[k], m.values[k], v.values[k]);
    vector(params, i) = p;
    vector(exp_avgs, i) = m;
    vector(exp_avg_sqs, i) = v;
  }
  for (int k = vectors * kWidth + i; k < size; k += kThreads) {
    step(params[k], grads[k], exp_avgs[k], exp_avg_sqs[k]);
  }
}

template <typename T>
void launch(const AdamWParams& p, cudaStream_t stream) {
  using Acc = AccOf<T>;
  Batch<Acc> batch = {.lr = static_cast<Acc>(p.lr),
                      .eps = static_cast<Acc>(p.eps),
                      .log_beta1 = static_cast<Acc>(std::log(p.beta1)),
                      .log_beta2 = static_cast<Acc>(std::log(p.beta2)),
                      .param_share = static_cast<Acc>(p.lr * p.weight_decay),
                      .exp_avg_share = static_cast<Acc>(1 - p.beta1),
                      .grad_share = static_cast<Acc>(p.maximize ? p.beta1 - 1 : 1 - p.beta1),
                      .exp_avg_sq_share = static_cast<Acc>(1 - p.beta2)};
  int64_t blocks = 0;
  const auto flush = [&] {
    if (blocks == 0) return;  // an empty grid is an error
    launch_waiting(adamw_kernel<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, batch);
    batch.num_tensors = 0;
    blocks = 0;
  };
  for (const AdamWTensor& tensor : p.tensors) {
    if (tensor.size == 0) continue;
    if (batch.num_tensors == kMaxTensors) flush();
    batch.tensors[batch.num_tensors] = tensor;
    batch.first_blocks[batch.num_tensors++] = static_cast<int32_t>(blocks);
    blocks += (tensor.size + kChunk<T> - 1) / kChunk<T>;
  }
  flush();
}

}  // namespace

void launch_adamw(const AdamWParams& params, cudaStream_t stream) {
  with_type(params.dtype, [&](auto element) { launch<decltype(element)>(params, stream); });
}

}  // namespace torchtune_fused
