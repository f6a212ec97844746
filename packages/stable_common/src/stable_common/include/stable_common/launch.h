// Kernel launches with attributes, and the device side of programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace stable_common {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  cudaStream_t stream = nullptr;
  size_t shared_memory_bytes = 0;
  // Lets the grid start while the one before it in the stream still runs: the kernel must call
  // wait_for_previous_grid() before it touches memory that an earlier kernel may write. Needs SM90.
  bool programmatic_dependent_launch = false;
  // If set, the kernel is loaded onto the current device, this is filled, and nothing is launched.
  // Else the first launch loads it, which may wait for what runs there: a kernel that waits for a
  // peer then keeps another from being launched that the peer waits for.
  cudaFuncAttributes* only_load = nullptr;
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const LaunchConfig& config, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  if (config.only_load != nullptr) return cudaFuncGetAttributes(config.only_load, kernel);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;

  cudaLaunchConfig_t launch_config = {};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.shared_memory_bytes;
  launch_config.stream = config.stream;
  launch_config.attrs = &attribute;
  launch_config.numAttrs = config.programmatic_dependent_launch ? 1 : 0;
  return cudaLaunchKernelEx(&launch_config, kernel, std::forward<Arguments>(arguments)...);
}

#if defined(__CUDACC__)

// Blocks until every grid that this one may overlap with has completed and its writes are visible.
// A no-op in a grid launched without programmatic dependent launch, and below SM90.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Allows the next grid of the stream to be scheduled. It says nothing about this grid's writes: the
// next grid sees those through its own wait_for_previous_grid(), which waits for this grid's end.
// But the compiler moves no access across it, so that what a block has done before, an atomic whose
// result it has used say, is done when a block of the next grid starts.
__device__ __forceinline__ void allow_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif  // defined(__CUDACC__)

}  // namespace stable_common
