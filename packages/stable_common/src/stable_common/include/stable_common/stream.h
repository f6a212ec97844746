// The stream and device that torch would use for a tensor.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "stable_common/cuda_check.h"

namespace stable_common {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream of `device_index`.
inline cudaStream_t current_stream(int32_t device_index) {
  if (!torch_has_cuda()) throw std::runtime_error("this build of torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace stable_common
