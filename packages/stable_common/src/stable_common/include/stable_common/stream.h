// torch's current device and stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "stable_common/cuda_check.h"

namespace stable_common {

// Makes a device current for as long as this lives.
//
// Nearly always it is already, and then to make a guard, or to ask torch for its current device,
// costs more than half of what a launch does. The runtime in this library answers at once, and it
// is the one that launches go through, so its current device is the one that counts.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t device_index) {
    int current = -1;
    STABLE_CUDA_CHECK(cudaGetDevice(&current));
    if (current != device_index) guard_.emplace(device_index);
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// torch's current stream of `device_index`.
inline cudaStream_t current_stream(int32_t device_index) {
  if (!torch_has_cuda()) throw std::runtime_error("this build of torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace stable_common
