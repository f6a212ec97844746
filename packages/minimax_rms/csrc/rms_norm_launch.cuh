// Launches the kernel that a tuning and a row's width ask for. One file for each type of element,
// so that they compile side by side.
#pragma once

#include "rms_norm.cuh"
#include "stable_common/launch.h"

namespace minimax_rms {

namespace launcher {

struct Launch {
  const RmsNormParams& params;
  RmsNormTuning tuning;
  stable_common::LaunchConfig config;

  template <typename Kernel>
  cudaError_t run(Kernel kernel) {
    config.grid = dim3(tuning.num_blocks);
    config.block = dim3(tuning.threads_per_block);
    return stable_common::launch(config, kernel, params);
  }
};

template <typename Element, int kWarps, int kVectors, bool kIsWide = false, int kEven = 0>
cudaError_t launch(Launch launch) {
  if (launch.params.num_ranks == 1) {
    if constexpr (kWarps >= 4) {
      return launch.run(lone_rms_norm_kernel<Element, kWarps, kVectors, kIsWide, kEven>);
    }
    return cudaErrorInvalidValue;
  }
  const int teams_per_block = launch.tuning.threads_per_block / device::Team<kWarps>::kThreads;
  const bool has_turns =
      static_cast<int64_t>(launch.tuning.num_blocks) * teams_per_block < launch.params.num_tokens;
  // What is wider than the registers of one row has none for a second.
  if constexpr (!kIsWide && kVectors <= 7) {
    if (has_turns) {
      return launch.run(rms_norm_kernel<Element, kWarps, kVectors, kIsWide, kEven, true>);
    }
  }
  return launch.run(rms_norm_kernel<Element, kWarps, kVectors, kIsWide, kEven, false>);
}

// The first of kVectors that is enough for each thread to hold its part of a row.
template <typename Element, int kWarps, int kVectors, int... kMore>
cudaError_t launch_that_fits(Launch launch_with) {
  const RmsNormParams& params = launch_with.params;
  constexpr int kTeam = kWarps * device::kWarpSize;
  if constexpr (kVectors % 7 == 0) {
    // MiniMax-M2's rows.
    if (params.q_vectors == kVectors / 7 * 6 * kTeam && params.k_vectors == kVectors / 7 * kTeam) {
      return launch<Element, kWarps, kVectors, false, kVectors>(launch_with);
    }
  }
  if (params.q_vectors + params.k_vectors <= kVectors * kTeam) {
    return launch<Element, kWarps, kVectors>(launch_with);
  }
  if constexpr (sizeof...(kMore) > 0) {
    return launch_that_fits<Element, kWarps, kMore...>(launch_with);
  } else {
    // Too wide for any: the largest team, which reads twice what it cannot hold.
    launch_with.tuning.threads_per_block = 8 * device::kWarpSize;
    return launch<Element, 8, 8, true>(launch_with);
  }
}

template <typename Element>
cudaError_t launch_for_team(const RmsNormParams& params, const RmsNormTuning& tuning,
                            const stable_common::LaunchConfig& config) {
  const Launch launch = {params, tuning, config};
  // MiniMax-M2's rows of q and k, 14336 bytes over all ranks, need 7 vectors of a thread.
  switch (tuning.warps_per_token) {
    case 1:
      return launch_that_fits<Element, 1, 4, max_vectors_of(1)>(launch);
    case 2:
      return launch_that_fits<Element, 2, 2, max_vectors_of(2)>(launch);
    case 4:
      return launch_that_fits<Element, 4, 2, 4, max_vectors_of(4)>(launch);
    default:
      return launch_that_fits<Element, 8, 1, 2, max_vectors_of(8)>(launch);
  }
}

}  // namespace launcher

}  // namespace minimax_rms
