// Driver API functions without a link to libcuda, which a machine that only builds does not have.
#pragma once

#include <cuda_runtime_api.h>

namespace stable_common {

// The driver's function `symbol` as of CUDA `version` (12030 is 12.3), or null where the installed
// driver is older or absent. `Function` is the type of its pointer: decltype(&cuMemCreate).
template <typename Function>
Function driver_function(const char* symbol, unsigned version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(symbol, &function, version, cudaEnableDefault, &found);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // a failed look-up is an answer, not an error to meet again later
    return nullptr;
  }
  return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function) : nullptr;
}

}  // namespace stable_common
