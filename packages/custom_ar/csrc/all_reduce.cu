#include "all_reduce.h"

#include "all_reduce.cuh"
#include "stable_common/launch.h"

namespace custom_ar {

namespace {

template <typename Element, int kWorldSize>
cudaError_t launch(const AllReduceParams& params, const AllReduceTuning& tuning,
                   const stable_common::DeviceProperties& device, cudaStream_t stream) {
  stable_common::LaunchConfig config;
  config.grid = dim3(tuning.num_blocks);
  config.block = dim3(tuning.threads_per_block + device::kControlThreads);
  config.stream = stream;
  config.programmatic_dependent_launch = device.has_programmatic_dependent_launch();
  return tuning.algorithm == Algorithm::kOneShot
             ? stable_common::launch(config, one_shot_kernel<Element, kWorldSize>, params)
             : stable_common::launch(config, two_shot_kernel<Element, kWorldSize>, params);
}

template <typename Element>
cudaError_t launch_for_world(const AllReduceParams& params, int world_size,
                             const AllReduceTuning& tuning,
                             const stable_common::DeviceProperties& device, cudaStream_t stream) {
  switch (world_size) {
    case 2:
      return launch<Element, 2>(params, tuning, device, stream);
    case 3:
      return launch<Element, 3>(params, tuning, device, stream);
    case 4:
      return launch<Element, 4>(params, tuning, device, stream);
    case 5:
      return launch<Element, 5>(params, tuning, device, stream);
    case 6:
      return launch<Element, 6>(params, tuning, device, stream);
    case 7:
      return launch<Element, 7>(params, tuning, device, stream);
    case 8:
      return launch<Element, 8>(params, tuning, device, stream);
    default:
      return cudaErrorInvalidValue;
  }
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
  switch (type) {
    case ElementType::kFloat32:
      return launch_for_world<float>(params, world_size, tuning, device, stream);
    case ElementType::kFloat16:
      return launch_for_world<__half>(params, world_size, tuning, device, stream);
    case ElementType::kBFloat16:
      return launch_for_world<__nv_bfloat16>(params, world_size, tuning, device, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace custom_ar
