#include "all_reduce.h"

#include <algorithm>

#include "all_reduce.cuh"
#include "stable_common/launch.h"

namespace custom_ar {

namespace {

template <typename Element, int kWorldSize>
cudaError_t launch(const AllReduceParams& params, Algorithm algorithm,
                   const stable_common::LaunchConfig& config) {
  return algorithm == Algorithm::kOneShot
             ? stable_common::launch(config, one_shot_kernel<Element, kWorldSize>, params)
             : stable_common::launch(config, two_shot_kernel<Element, kWorldSize>, params);
}

template <typename Element>
cudaError_t launch_for_world(const AllReduceParams& params, int world_size, Algorithm algorithm,
                             const stable_common::LaunchConfig& config) {
  switch (world_size) {
    case 2:
      return launch<Element, 2>(params, algorithm, config);
    case 3:
      return launch<Element, 3>(params, algorithm, config);
    case 4:
      return launch<Element, 4>(params, algorithm, config);
    case 5:
      return launch<Element, 5>(params, algorithm, config);
    case 6:
      return launch<Element, 6>(params, algorithm, config);
    case 7:
      return launch<Element, 7>(params, algorithm, config);
    case 8:
      return launch<Element, 8>(params, algorithm, config);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_for_type(const AllReduceParams& params, ElementType type, int world_size,
                            Algorithm algorithm, const stable_common::LaunchConfig& config) {
  switch (type) {
    case ElementType::kFloat32:
      return launch_for_world<float>(params, world_size, algorithm, config);
    case ElementType::kFloat16:
      return launch_for_world<__half>(params, world_size, algorithm, config);
    case ElementType::kBFloat16:
      return launch_for_world<__nv_bfloat16>(params, world_size, algorithm, config);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

uint64_t make_descriptor(ElementType type, Algorithm algorithm, int64_t num_elements) {
  return static_cast<uint64_t>(num_elements) | static_cast<uint64_t>(type) << kDescriptorTypeShift |
         static_cast<uint64_t>(algorithm) << kDescriptorAlgorithmShift;
}

cudaError_t launch_all_reduce(const AllReduceParams& params, ElementType type, int world_size,
                              const AllReduceTuning& tuning,
                              const stable_common::DeviceProperties& device, cudaStream_t stream) {
  if (tuning.num_blocks < 1 || tuning.threads_per_block < 1 ||
      tuning.threads_per_block > kMaxDataThreads || tuning.depth < 1) {
    return cudaErrorInvalidValue;
  }
  stable_common::LaunchConfig config;
  config.grid = dim3(tuning.num_blocks);
  config.block = dim3(tuning.threads_per_block + kControlThreads);
  config.stream = stream;
  config.programmatic_dependent_launch = device.has_programmatic_dependent_launch();
  return launch_for_type(params, type, world_size, tuning.algorithm, config);
}

cudaError_t load_all_reduce_kernels(int world_size, int* max_registers) {
  cudaFuncAttributes attributes = {};
  stable_common::LaunchConfig config;
  config.only_load = &attributes;
  *max_registers = 0;
  for (const ElementType type :
       {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
    for (const Algorithm algorithm : {Algorithm::kOneShot, Algorithm::kTwoShot}) {
      const cudaError_t error = launch_for_type({}, type, world_size, algorithm, config);
      if (error != cudaSuccess) return error;
      *max_registers = std::max(*max_registers, attributes.numRegs);
    }
  }
  return cudaSuccess;
}

}  // namespace custom_ar
