// Checks of CUDA runtime and driver calls, safe under a CPU-only torch.
//
// torch's own STD_CUDA_CHECK and STD_CUDA_KERNEL_LAUNCH_CHECK call shims that a CPU build of
// libtorch does not export. Declared weak they resolve to null there, and the library still loads;
// but torch's macros call them even on success. STABLE_CUDA_CHECK calls torch's only on an error,
// and only where it can.
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

[[noreturn]] inline void throw_cuda_error(cudaError_t error, const char* call, const char* file,
                                          int line) {
  (void)cudaGetLastError();  // not to be met again by a later check
  if (&torch_c10_cuda_check_msg != nullptr) STD_CUDA_CHECK(error);  // torch's text, with its hints
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error) + " (" +
                           std::to_string(static_cast<int>(error)) + ") from " + call + " at " +
                           file + ":" + std::to_string(line));
}

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

// Throws std::runtime_error for any cudaError_t but cudaSuccess.
#define STABLE_CUDA_CHECK(call)                                                        \
  do {                                                                                 \
    const cudaError_t stable_cuda_error = (call);                                      \
    if (stable_cuda_error != cudaSuccess) {                                            \
      ::stable_common::throw_cuda_error(stable_cuda_error, #call, __FILE__, __LINE__); \
    }                                                                                  \
  } while (0)

// The same for the driver API: throws std::runtime_error with the driver's text for CUresult.
#define STABLE_CU_CHECK(call) ::stable_common::check_driver_call((call), #call, __FILE__, __LINE__)
