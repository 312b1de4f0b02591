// Host helpers around the CUDA runtime that know nothing of torch: what a `.cu` file includes.
//
// Keeping torch's headers out of `.cu` files matters for build time: nvcc parses a `.cu` once for
// the host and once per architecture, and torch's headers alone cost it several seconds each time.
#pragma once

#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>

// Throws std::runtime_error (RuntimeError in Python) with the text built from the rest of the
// arguments: one line that says what was expected, what came, and what to do.
#define TTF_CHECK(condition, ...)                            \
  do {                                                       \
    if (!(condition)) ::torchtune_fused::raise(__VA_ARGS__); \
  } while (false)

// For every runtime call, and as TTF_CUDA_CHECK(cudaGetLastError()) after every <<<>>> launch.
#define TTF_CUDA_CHECK(call)                                                                  \
  do {                                                                                        \
    const cudaError_t error_ = (call);                                                        \
    if (error_ != cudaSuccess) {                                                              \
      (void)cudaGetLastError(); /* else the next launch check would report this one again */  \
      ::torchtune_fused::raise("CUDA error in ", __func__, ": ", cudaGetErrorString(error_)); \
    }                                                                                         \
  } while (false)

namespace torchtune_fused {

template <typename... Args>
[[noreturn]] void raise(const Args&... args) {
  std::ostringstream message;
  message << "torchtune_fused: ";
  (message << ... << args);
  throw std::runtime_error(message.str());
}

// Element types. Only what is no matter of speed takes all of them; the rest takes the first two.
enum class DType { kFloat16, kBFloat16, kFloat32, kFloat64 };

// What the dispatch code must know of the GPU that a launch goes to.
struct DeviceProperties {
  int arch;  // major * 10 + minor of the code path to take: 80, 86, 89, 90, ...
  int num_sms;
  int max_shared_per_block;  // bytes, with the opt-in of cudaFuncSetAttribute
  int l2_bytes;
};

// Properties of the current device, read once per device. A build for one forced architecture
// (TORCHTUNE_FUSED_ARCH) answers with that architecture and its shared memory limit, so that the
// whole path of, say, an A10 runs on the newer GPU at hand.
inline const DeviceProperties& device_properties() {
  constexpr int kMaxDevices = 64;
  static DeviceProperties cache[kMaxDevices];
  static bool known[kMaxDevices];
  int device = 0;
  TTF_CUDA_CHECK(cudaGetDevice(&device));
  TTF_CHECK(device < kMaxDevices, "device index ", device, " is above the ", kMaxDevices,
            " devices supported");
  if (!known[device]) {
    const auto read = [device](cudaDeviceAttr attribute) {
      int value = 0;
      TTF_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
      return value;
    };
    DeviceProperties p;
    p.arch = 10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor);
    p.num_sms = read(cudaDevAttrMultiProcessorCount);
    p.max_shared_per_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p.l2_bytes = read(cudaDevAttrL2CacheSize);
#ifdef TTF_FORCED_ARCH
    p.arch = TTF_FORCED_ARCH;
    const int limit = (p.arch == 80 ? 163 : p.arch == 90 ? 227 : 99) * 1024;
    p.max_shared_per_block = p.max_shared_per_block < limit ? p.max_shared_per_block : limit;
#endif
    cache[device] = p;
    known[device] = true;  // two threads racing here write the same values
  }
  return cache[device];
}

}  // namespace torchtune_fused
