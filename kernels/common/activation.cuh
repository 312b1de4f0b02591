// Activations and their derivatives, in fp32 or fp64.
#pragma once

#include <type_traits>

#include "common/activation.h"

namespace torchtune_fused {

// 1 / (1 + e^-x). The error of the fast exponential, relative to e^-x, fades where e^-x is small
// beside 1, and where it is large the result is small: at most a few roundings of fp32.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1. / (1. + exp(-x)); }

template <Activation kActivation>
using ActivationConstant = std::integral_constant<Activation, kActivation>;

template <typename F>
struct ValueAndSlope {
  F value, slope;
};

template <Activation kActivation, typename F>
__device__ __forceinline__ ValueAndSlope<F> activate_with_slope(F x) {
  if constexpr (kActivation == Activation::kSilu) {
    const F s = sigmoid(x);
    return {x * s, s * (F(1) + x * (F(1) - s))};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = sigmoid(2 u)
    constexpr F kTwoU = F(1.5957691216057308), kCubic = F(0.044715);
    const F square = x * x;
    const F s = sigmoid(kTwoU * x * (F(1) + kCubic * square));
    return {x * s, s + x * s * (F(1) - s) * kTwoU * (F(1) + F(3) * kCubic * square)};
  } else if constexpr (kActivation == Activation::kGelu) {
    const F cdf = F(0.5) * (F(1) + erf(x * F(0.7071067811865476)));
    return {x * cdf, cdf + x * exp(F(-0.5) * x * x) * F(0.3989422804014327)};
  } else {
    return {x <= F(0) ? F(0) : x, F(x <= F(0) ? 0 : 1)};  // NaN stays NaN
  }
}

template <Activation kActivation, typename F>
__device__ __forceinline__ F activate(F x) {
  return activate_with_slope<kActivation>(x).value;
}

// Calls f with a constant of the activation's value, so that the choice is made outside of loops.
template <typename F>
__device__ __forceinline__ void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kSilu: return f(ActivationConstant<Activation::kSilu>{});
    case Activation::kGeluTanh: return f(ActivationConstant<Activation::kGeluTanh>{});
    case Activation::kGelu: return f(ActivationConstant<Activation::kGelu>{});
    case Activation::kRelu: return f(ActivationConstant<Activation::kRelu>{});
  }
}

}  // namespace torchtune_fused
