// torch's current device and stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "stable_common/cuda_check.h"

namespace stable_common {

// Makes a device current for as long as this lives. Costs little where it is current already, as it
// is for nearly all calls.
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t device_index) {
    if (torch::stable::accelerator::getCurrentDeviceIndex() != device_index) {
      guard_.emplace(device_index);
    }
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
