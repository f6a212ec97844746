#include "rms_norm.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>

#include "stable_common/launch.h"

namespace minimax_rms {

namespace launcher {

// In rms_norm_launch.cuh; a file for each element instantiates it.
template <typename Element>
cudaError_t launch_for_team(const RmsNormParams& params, const RmsNormTuning& tuning,
                            const stable_common::LaunchConfig& config);

}  // namespace launcher

namespace {

cudaError_t launch_for_type(const RmsNormParams& params, ElementType type,
                            const RmsNormTuning& tuning,
                            const stable_common::LaunchConfig& config) {
  switch (type) {
    case ElementType::kFloat32:
      return launcher::launch_for_team<float>(params, tuning, config);
    case ElementType::kFloat16:
      return launcher::launch_for_team<__half>(params, tuning, config);
    case ElementType::kBFloat16:
      return launcher::launch_for_team<__nv_bfloat16>(params, tuning, config);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

uint64_t make_descriptor(const RmsNormParams& params, ElementType type, bool has_k) {
  // The finaliser of MurmurHash3: each bit of the result depends on each of `value`.
  const auto mix = [](uint64_t value) {
    value = (value ^ value >> 33) * 0xff51afd7ed558ccdu;
    value = (value ^ value >> 33) * 0xc4ceb9fe1a85ec53u;
    return value ^ value >> 33;
  };
  const uint64_t widths =
      static_cast<uint64_t>(params.q_vectors) << 32 | static_cast<uint64_t>(params.k_vectors);
  const uint64_t rest =
      uint64_t{std::bit_cast<uint32_t>(params.eps)} << 32 | static_cast<uint64_t>(type);
  const uint64_t hash = mix(mix(widths) ^ rest) >> (64 - kDescriptorHashBits);
  return static_cast<uint64_t>(params.num_tokens) | hash << kDescriptorTokenBits |
         (has_k ? kDescriptorHasK : 0);
}

cudaError_t launch_rms_norm(const RmsNormParams& params, ElementType type,
                            const RmsNormTuning& requested,
                            const stable_common::DeviceProperties& device, cudaStream_t stream) {
  constexpr int kWarpSize = 32;
  RmsNormTuning tuning = requested;
  if (params.num_ranks == 1 && tuning.warps_per_token < 4) {
    // Alone, a row has nothing to wait for, and small teams no kernels.
    tuning.warps_per_token = 4;
    tuning.threads_per_block = 4 * kWarpSize;
  }
  const int warps = tuning.warps_per_token;
  const int threads = tuning.threads_per_block;
  const bool is_team = warps == 1 || warps == 2 || warps == 4 || warps == 8;
  if (!is_team || tuning.num_blocks < 1 || threads < 1 || threads > max_threads_of(warps) ||
      threads % (warps * kWarpSize) != 0) {
    return cudaErrorInvalidValue;
  }
  stable_common::LaunchConfig config;
  config.stream = stream;
  config.programmatic_dependent_launch = device.has_programmatic_dependent_launch();
  return launch_for_type(params, type, tuning, config);
}

cudaError_t load_rms_norm_kernels() {
  constexpr int kWarpSize = 32;
  stable_common::LaunchConfig config;
  cudaFuncAttributes attributes = {};
  config.only_load = &attributes;
  RmsNormParams params;
  params.num_ranks = 2;
  // One token for a team, and two.
  RmsNormTuning tuning;
  for (const int warps : {1, 2, 4, 8}) {
    tuning.warps_per_token = warps;
    tuning.threads_per_block = warps * kWarpSize;
    // Rows of each number of vectors a thread, of q alone and as MiniMax-M2's are divided, and one
    // that no team holds.
    const int most = max_vectors_of(warps) + (warps == 8 ? 1 : 0);
    for (int vectors = 1; vectors <= most; ++vectors) {
      for (const bool is_even : {false, true}) {
        if (is_even && vectors % 7 != 0) continue;
        const int row = vectors * warps * kWarpSize;
        params.k_vectors = is_even ? row / 7 : 0;
        params.q_vectors = row - params.k_vectors;
        for (params.num_tokens = 1; params.num_tokens <= 2; ++params.num_tokens) {
          for (const ElementType type :
               {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
            const cudaError_t error = launch_for_type(params, type, tuning, config);
            if (error != cudaSuccess) return error;
          }
        }
      }
    }
  }
  return cudaSuccess;
}

}  // namespace minimax_rms
