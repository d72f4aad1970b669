// The element types of activations, biases and results.
#pragma once

namespace liquidgemm {

enum class Element : int { kBFloat16, kFloat16, kFloat32, kInt32, kInt8 };

}  // namespace liquidgemm
