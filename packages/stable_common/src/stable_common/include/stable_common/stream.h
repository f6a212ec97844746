// torch's current device and stream.
#pragma once

#include <cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "stable_common/cuda_check.h"
#include "stable_common/driver_api.h"

namespace stable_common {

// Makes a device current for as long as this lives.
//
// Nearly always it is already, and then no guard is made: to make and destroy one takes an
// allocation and two calls of torch. What counts is the device of the driver's current context,
// which a launch uses. (cudaGetDevice() would not do: each copy of the runtime remembers a device
// of its own.)
class CurrentDevice {
 public:
  explicit CurrentDevice(int32_t device_index) {
    static const auto get_device =
        driver_function<decltype(&cuCtxGetDevice)>("cuCtxGetDevice", 12000);
    CUdevice current = -1;
    const bool is_current =
        get_device != nullptr && get_device(&current) == CUDA_SUCCESS && current == device_index;
    if (!is_current) guard_.emplace(device_index);
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

// torch's current device: torch remembers it, other copies of the CUDA runtime do not.
inline int32_t current_device_index() {
  return torch::stable::accelerator::getCurrentDeviceIndex();
}

}  // namespace stable_common
