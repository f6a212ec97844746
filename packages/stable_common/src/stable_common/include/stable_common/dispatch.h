// From a runtime type to a compile-time one.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <utility>

namespace stable_common {

// Stands for a type where a value is needed: `typename decltype(tag)::type`.
template <typename Type>
struct TypeTag {
  using type = Type;
};

enum class Float16Type { kBFloat16, kFloat16 };

// Calls `function(TypeTag<T>{})` with the 16-bit floating-point type that `type` names.
template <typename Function>
decltype(auto) dispatch_float16(Float16Type type, Function&& function) {
  if (type == Float16Type::kBFloat16) {
    return std::forward<Function>(function)(TypeTag<__nv_bfloat16>{});
  }
  return std::forward<Function>(function)(TypeTag<__half>{});
}

}  // namespace stable_common
