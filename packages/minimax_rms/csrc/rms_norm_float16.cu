#include "rms_norm_launch.cuh"

namespace minimax_rms::launcher {

template cudaError_t launch_for_team<__half>(const RmsNormParams&, const RmsNormTuning&,
                                             const stable_common::LaunchConfig&);

}  // namespace minimax_rms::launcher
