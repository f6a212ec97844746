// 16-byte global memory access, and bf16 and fp16 values packed two to a 32-bit word.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace stable_common {

// 16 bytes in one instruction. The address must be a multiple of 16.
//
// The cache hints that suggest themselves for data read once, L1::no_allocate and ld.global.nc,
// were slower: 266 against 259 us for a pass over 1 GiB on an H200.
__device__ __forceinline__ uint4 load_16_bytes(const void* address) {
  return *static_cast<const uint4*>(address);
}

// Brings a line into L2, where the GPU's writes meet: what another grid has yet to write there is
// updated, so this may be asked for before wait_for_previous_grid().
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Two values of a 16-bit floating-point type in a 32-bit word, the first in the low half.
template <typename Element>
struct Packed2;

template <>
struct Packed2<__nv_bfloat16> {
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    // A bf16 is the upper half of the fp32 with the same value.
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t pack(float2 values) {
    const __nv_bfloat162 packed = __float22bfloat162_rn(values);
    return reinterpret_cast<const uint32_t&>(packed);
  }
  // The larger absolute value of each half; a NaN loses against a number.
  static __device__ __forceinline__ uint32_t max_abs(uint32_t a, uint32_t b) {
    const __nv_bfloat162 max = __hmax2(__habs2(reinterpret_cast<const __nv_bfloat162&>(a)),
                                       __habs2(reinterpret_cast<const __nv_bfloat162&>(b)));
    return reinterpret_cast<const uint32_t&>(max);
  }
};

template <>
struct Packed2<__half> {
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  }
  static __device__ __forceinline__ uint32_t pack(float2 values) {
    const __half2 packed = __float22half2_rn(values);
    return reinterpret_cast<const uint32_t&>(packed);
  }
  static __device__ __forceinline__ uint32_t max_abs(uint32_t a, uint32_t b) {
    const __half2 max = __hmax2(__habs2(reinterpret_cast<const __half2&>(a)),
                                __habs2(reinterpret_cast<const __half2&>(b)));
    return reinterpret_cast<const uint32_t&>(max);
  }
};

// The fp32 values of a vector of 16 bytes, and back, rounded once.
template <typename Element>
struct VectorValues {
  static constexpr int kCount = 16 / sizeof(Element);

  static __device__ __forceinline__ void unpack(uint4 v, float (&values)[kCount]) {
    const uint32_t words[] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 4) {
        values[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = Packed2<Element>::unpack(words[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
      }
    }
  }

  static __device__ __forceinline__ uint4 pack(const float (&values)[kCount]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Element) == 4) {
        words[i] = __float_as_uint(values[i]);
      } else {
        words[i] = Packed2<Element>::pack(make_float2(values[2 * i], values[2 * i + 1]));
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

}  // namespace stable_common
