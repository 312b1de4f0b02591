// The activations of a gated MLP, and their names in Python.
#pragma once

#include <string>

#include "common/cuda_utils.h"

namespace torchtune_fused {

enum class Activation { kSilu, kGeluTanh, kGelu, kRelu };

inline Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "gelu") return Activation::kGelu;
  if (name == "relu") return Activation::kRelu;
  raise("activation must be silu, gelu_tanh, gelu or relu, got ", name);
}

}  // namespace torchtune_fused
