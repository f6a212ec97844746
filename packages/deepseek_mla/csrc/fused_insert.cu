#include "fused_insert.h"

#include "fused_insert.cuh"
#include "stable_common/launch.h"

namespace deepseek_mla {

namespace {

int ceil_divide(int64_t dividend, int64_t divisor) {
  return static_cast<int>((dividend + divisor - 1) / divisor);
}

template <typename Element, QueryOutput kOutput, int kLanes>
cudaError_t launch(const FusedInsertParams& params, const FusedInsertTuning& tuning,
                   const stable_common::DeviceProperties& device, cudaStream_t stream) {
  constexpr int kHeadsPerWarp = device::kWarpSize / kLanes;
  const int warps_per_block = tuning.warps_per_block;
  FusedInsertGrid grid = {};
  grid.num_kv_blocks = ceil_divide(params.num_insert_tokens, warps_per_block);
  grid.head_groups_per_token =
      kOutput == QueryOutput::kNone ? 0 : ceil_divide(params.num_heads_padded, kHeadsPerWarp);
  const int num_head_blocks =
      ceil_divide(int64_t{params.num_tokens} * grid.head_groups_per_token, warps_per_block);
  if (grid.num_kv_blocks + num_head_blocks == 0) return cudaSuccess;

  stable_common::LaunchConfig config;
  config.grid = dim3(grid.num_kv_blocks + num_head_blocks);
  config.block = dim3(warps_per_block * device::kWarpSize);
  config.stream = stream;
  config.programmatic_dependent_launch = device.has_programmatic_dependent_launch();
  return stable_common::launch(config, fused_insert_kernel<Element, kOutput, kLanes>, params, grid,
                               tuning.prefetch && config.programmatic_dependent_launch);
}

template <typename Element, QueryOutput kOutput>
cudaError_t launch_with_lanes(const FusedInsertParams& params, const FusedInsertTuning& tuning,
                              const stable_common::DeviceProperties& device, cudaStream_t stream) {
  switch (tuning.lanes_per_head) {
    case 8:
      return launch<Element, kOutput, 8>(params, tuning, device, stream);
    case 16:
      return launch<Element, kOutput, 16>(params, tuning, device, stream);
    case 32:
      return launch<Element, kOutput, 32>(params, tuning, device, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_fused_insert(const FusedInsertParams& params, const FusedInsertTuning& tuning,
                                const stable_common::DeviceProperties& device,
                                cudaStream_t stream) {
  return stable_common::dispatch_float16(params.dtype, [&](auto tag) {
    using Element = typename decltype(tag)::type;
    switch (params.query_output) {
      case QueryOutput::kFloat16:
        return launch_with_lanes<Element, QueryOutput::kFloat16>(params, tuning, device, stream);
      case QueryOutput::kE4M3:
        return launch_with_lanes<Element, QueryOutput::kE4M3>(params, tuning, device, stream);
      case QueryOutput::kNone:
        break;
    }
    return launch<Element, QueryOutput::kNone, 32>(params, tuning, device, stream);
  });
}

}  // namespace deepseek_mla
