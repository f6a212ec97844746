// Checks of CUDA runtime and driver calls, safe to link into a library that a CPU-only torch loads.
//
// torch's own STD_CUDA_CHECK and STD_CUDA_KERNEL_LAUNCH_CHECK are used as they are. They call shims
// that a CPU build of libtorch does not export; declared weak, they resolve to null there and the
// library still loads. Nothing reaches them on such a torch, since no tensor is on a CUDA device.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <stdexcept>
#include <string>

#include "stable_common/driver_api.h"

#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg

namespace stable_common {

// Whether the libtorch in this process was built with CUDA.
inline bool torch_has_cuda() { return &aoti_torch_get_current_cuda_stream != nullptr; }

inline void check_driver_call(CUresult result, const char* call, const char* file, int line) {
  if (result == CUDA_SUCCESS) return;
  const char* text = "unknown error";
  if (const auto get_error_string =
          driver_function<decltype(&cuGetErrorString)>("cuGetErrorString", 6000)) {
    get_error_string(result, &text);
  }
  throw std::runtime_error(std::string("CUDA driver error: ") + text + " (" +
                           std::to_string(static_cast<int>(result)) + ") from " + call + " at " +
                           file + ":" + std::to_string(line));
}

}  // namespace stable_common

// The driver API's STD_CUDA_CHECK: throws std::runtime_error with the driver's text for CUresult.
#define STABLE_CU_CHECK(call) ::stable_common::check_driver_call((call), #call, __FILE__, __LINE__)
