// The floating-point types of tensors. No torch header here.
#pragma once

#include <cstdint>

namespace stable_common {

enum class ElementType : uint32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int element_bytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

}  // namespace stable_common
