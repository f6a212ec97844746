#include "probe.h"

#include "stable_common/fp8.cuh"
#include "stable_common/launch.h"
#include "stable_common/vector.cuh"

namespace {

template <typename Element>
__global__ void convert(const void* values, uint8_t* bytes, int32_t* exponents, int n) {
  using stable_common::Packed2;
  stable_common::wait_for_previous_grid();
  stable_common::allow_next_grid();
  const int first = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  if (first >= n) return;
  const uint4 chunk = stable_common::load_16_bytes(static_cast<const uint32_t*>(values) + first);
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  for (int i = 0; i < 4; ++i) {
    const float2 v = Packed2<Element>::unpack(words[i]);
    const uint32_t pair = stable_common::to_e4m3x2(v.x, v.y);
    bytes[2 * (first + i)] = pair & 0xff;
    bytes[2 * (first + i) + 1] = pair >> 8;
    const float2 halves = Packed2<Element>::unpack(Packed2<Element>::max_abs(words[i], words[i]));
    exponents[first + i] = stable_common::e4m3_block_exponent(fmaxf(halves.x, halves.y));
  }
}

}  // namespace

cudaError_t launch_convert(const void* values, uint8_t* bytes, int32_t* exponents, int n,
                           stable_common::Float16Type type, bool programmatic_dependent_launch,
                           cudaStream_t stream) {
  return stable_common::dispatch_float16(type, [&](auto tag) {
    stable_common::LaunchConfig config;
    config.block = dim3(128);
    config.grid = dim3((n / 4 + 127) / 128);
    config.stream = stream;
    config.programmatic_dependent_launch = programmatic_dependent_launch;
    return stable_common::launch(config, convert<typename decltype(tag)::type>, values, bytes,
                                 exponents, n);
  });
}
