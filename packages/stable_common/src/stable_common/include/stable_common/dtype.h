// From torch's dtypes to those that kernels take.
#pragma once

#include <optional>

#include "stable_common/element_type.h"
#include "stable_common/tensor_check.h"

namespace stable_common {

inline std::optional<ElementType> element_type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::Half:
      return ElementType::kFloat16;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    default:
      return std::nullopt;
  }
}

// Of a tensor that must have one.
inline ElementType element_type_of(const Argument& argument) {
  const std::optional<ElementType> type = element_type_of(argument.dtype());
  if (!type) argument.has_dtype({ScalarType::BFloat16, ScalarType::Half, ScalarType::Float});
  return *type;
}

}  // namespace stable_common
