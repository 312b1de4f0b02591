// What the torch-facing `.cpp` of an op family needs: torch's stable ABI, and checks on tensors.
//
// Only torch/csrc/stable and torch/headeronly may be included, so that one library serves every
// Python and every torch from 2.10 on. In that ABI an op's scalar parameters must be `double`,
// `int64_t` or `bool`: `float` and `int32_t` compile, and arrive as garbage.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/cuda_utils.h"

namespace torchtune_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's device current, for the lifetime of this object, and names the stream that
// torch queues its work on there.
class LaunchContext {
 public:
  explicit LaunchContext(const Tensor& on)
      : device_index_(on.get_device_index()), guard_(device_index_) {
    void* stream = nullptr;
    TTF_CHECK(aoti_torch_get_current_cuda_stream(device_index_, &stream) == TORCH_SUCCESS,
              "torch has no current stream on device ", device_index_);
    stream_ = static_cast<cudaStream_t>(stream);
    // The guard does nothing in a thread whose device it is already, such as autograd's in its
    // first call. The driver's own functions, unlike the runtime's, then find no context to work
    // in.
    TTF_CUDA_CHECK(cudaSetDevice(device_index_));
  }
  cudaStream_t stream() const { return stream_; }

 private:
  int32_t device_index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline std::string shape_string(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

// The tensor lives on the same CUDA device as `reference`. A name is anything that a stream takes:
// it becomes text only where a check fails.
template <typename Name>
void check_device(const Tensor& t, Name name, const Tensor& reference) {
  TTF_CHECK(t.is_cuda() && t.get_device_index() == reference.get_device_index(), name,
            " must be on cuda:", reference.get_device_index(), ", got ",
            t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device type");
}

template <typename Name>
void check_dtype(const Tensor& t, Name name, ScalarType expected) {
  TTF_CHECK(t.scalar_type() == expected, name, " must be ", torch::headeronly::toString(expected),
            ", got ", torch::headeronly::toString(t.scalar_type()));
}

// The shape, where -1 stands for any size.
inline void check_shape(const Tensor& t, const char* name,
                        std::initializer_list<int64_t> expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (int64_t size : expected) {
    same = same && (size == -1 || t.size(i) == size);
    ++i;
  }
  if (same) return;
  std::string text;
  for (int64_t size : expected) {
    text += (text.empty() ? "" : ", ") + (size == -1 ? std::string("*") : std::to_string(size));
  }
  raise(name, " must have shape [", text, "], got ", shape_string(t));
}

template <typename Name>
void check_contiguous(const Tensor& t, Name name) {
  TTF_CHECK(t.is_contiguous(), name, " must be contiguous; pass ", name, ".contiguous()");
}

// Where loads of 16 bytes can begin.
inline bool starts_at_16_bytes(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

inline void check_aligned(const Tensor& t, const char* name) {
  TTF_CHECK(starts_at_16_bytes(t), name, " must start at a multiple of 16 bytes; pass ", name,
            ".clone()");
}

// A matrix of 16-bit elements in dense rows that all start at multiples of 16 bytes.
inline bool has_rows_of_16_bytes(const Tensor& t) {
  return t.dim() == 2 && t.size(1) % 8 == 0 && t.stride(1) == 1 && t.stride(0) % 8 == 0 &&
         starts_at_16_bytes(t);
}

// On the device of x, of its dtype and of the shape, contiguous.
inline void check_like(const Tensor& t, const char* name, const Tensor& x,
                       std::initializer_list<int64_t> shape) {
  check_device(t, name, x);
  check_dtype(t, name, x.scalar_type());
  check_shape(t, name, shape);
  check_contiguous(t, name);
}

// The strides of the first dimensions, in elements.
template <int kCount>
void copy_strides(const Tensor& t, int64_t (&strides)[kCount]) {
  for (int i = 0; i < kCount; ++i) strides[i] = t.stride(i);
}

// How many slots of a KV cache are filled: one integer, to be read on the device.
inline const int64_t* cache_length(const Tensor& length, const Tensor& q) {
  check_device(length, "length", q);
  check_dtype(length, "length", ScalarType::Long);
  TTF_CHECK(length.numel() == 1, "length must have one element, got ", length.numel());
  return static_cast<const int64_t*>(length.const_data_ptr());
}

// A contiguous tensor of its own on the device of `like`, and of its dtype unless another is given.
// Like `dense`, not through the dispatcher, on which a small op would spend most of its time.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
    strides[i] = stride;
  }
  int32_t device_type, type;
  TTF_CHECK(aoti_torch_get_device_type(like.get(), &device_type) == TORCH_SUCCESS &&
                aoti_torch_get_dtype(like.get(), &type) == TORCH_SUCCESS,
            "torch does not know the tensor's device and dtype");
  if (dtype) type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle handle;
  const auto code =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               type, device_type, like.get_device_index(), &handle);
  TTF_CHECK(code == TORCH_SUCCESS, "torch has no memory for another tensor");
  return Tensor(handle);
}

// The tensor itself if it is contiguous, else a copy.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The element type, which must be a floating-point one.
inline DType floating_dtype(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  if (dtype == ScalarType::Half) return DType::kFloat16;
  if (dtype == ScalarType::BFloat16) return DType::kBFloat16;
  if (dtype == ScalarType::Float) return DType::kFloat32;
  if (dtype == ScalarType::Double) return DType::kFloat64;
  raise(name, " must be a floating-point tensor, got ", torch::headeronly::toString(dtype));
}

// What sums of elements are kept in.
inline ScalarType accumulator_of(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// The element type, which must be one that all kernels are instantiated for.
inline DType half_dtype(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  TTF_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, name,
            " must be float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

}  // namespace torchtune_fused
