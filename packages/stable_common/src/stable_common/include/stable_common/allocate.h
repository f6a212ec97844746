// Memory for the results of operators.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

#include "stable_common/tensor_check.h"

namespace stable_common {

// Raises that memory is lacking. The packages' Python functions make a torch.OutOfMemoryError of an
// error with these words (python/out_of_memory.py); an operator itself can raise no other type than
// RuntimeError through torch's stable ABI.
template <typename... Parts>
void check_allocated(bool is_allocated, const char* op, const Parts&... what) {
  check(is_allocated, op, "cannot allocate ", what...);
}

// A tensor of `rank` dimensions, not initialised. `what` describes it in the error.
//
// The shim itself: through the dispatcher it takes longer than the rest of a call. It answers with
// a code and no reason, and memory is what can be lacking here.
template <typename... Parts>
Tensor allocate_tensor(const char* op, int64_t rank, const int64_t* sizes, const int64_t* strides,
                       int32_t dtype, const Device& device, const Parts&... what) {
  AtenTensorHandle handle = nullptr;
  const bool is_allocated = aoti_torch_empty_strided(rank, sizes, strides, dtype, device.type,
                                                     device.index, &handle) == AOTI_TORCH_SUCCESS;
  check_allocated(is_allocated, op, what...);
  return Tensor(handle);
}

}  // namespace stable_common
