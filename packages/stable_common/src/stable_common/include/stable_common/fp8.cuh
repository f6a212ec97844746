// FP8 E4M3 values and E8M0 block scales (OCP Microscaling Formats v1.0), as bytes.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace stable_common {

constexpr float kE4M3Max = 448.0f;
constexpr int kE8M0Bias = 127;
constexpr int kE8M0NaN = 255;

// Two fp32 values to E4M3, the first in the low byte: round to nearest even, saturated to +-448,
// NaN to 0x7f. One instruction from SM89 on, arithmetic below.
__device__ __forceinline__ uint32_t to_e4m3x2(float low, float high) {
#if __CUDA_ARCH__ < 890
  // The header's arithmetic keeps a NaN's sign, the instruction drops it.
  low = low != low ? __uint_as_float(0x7fffffffu) : low;
  high = high != high ? __uint_as_float(0x7fffffffu) : high;
#endif
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

// The least e with max_abs <= 448 * 2^e, for a normal, positive max_abs.
//
// 448 is 1.75 * 2^8: the exponent of max_abs less 8, one more where the mantissa exceeds 1.75's,
// which is where adding (all mantissa bits - mantissa of 1.75) carries into the exponent.
__device__ __forceinline__ int e4m3_block_exponent(float max_abs) {
  constexpr uint32_t kMantissaMask = 0x7fffffu;
  constexpr uint32_t kMantissaOf448 = 0x600000u;
  const uint32_t bits = __float_as_uint(max_abs) + (kMantissaMask - kMantissaOf448);
  return static_cast<int>(bits >> 23) - 127 - 8;
}

// 2^exponent for an exponent in [-126, 127].
__device__ __forceinline__ float exp2_integer(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

}  // namespace stable_common
