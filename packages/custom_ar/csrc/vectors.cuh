// A message as vectors of 16 bytes, the last of which may be partial, and how they are summed.
#pragma once

#include <cstdint>
#include <type_traits>

#include "exchange.cuh"
#include "stable_common/vector.cuh"

namespace custom_ar::device {

template <typename Element>
using Values = stable_common::VectorValues<Element>;

__device__ __forceinline__ uint4 select(bool condition, uint4 a, uint4 b) {
  return make_uint4(condition ? a.x : b.x, condition ? a.y : b.y, condition ? a.z : b.z,
                    condition ? a.w : b.w);
}

// The sum of all ranks' vectors, in rank order whichever rank computes it. `peers` leaves `rank`
// out.
template <typename Element, int kWorldSize>
__device__ __forceinline__ uint4 sum_ranks(uint4 own, int rank,
                                           const uint4 (&peers)[kWorldSize - 1]) {
  constexpr int kCount = Values<Element>::kCount;
  float sum[kCount];
  Values<Element>::unpack(select(rank == 0, own, peers[0]), sum);
#pragma unroll
  for (int r = 1; r < kWorldSize; ++r) {
    uint4 v = select(r == rank, own, peers[r - 1]);
    if (r < kWorldSize - 1) v = select(r < rank, peers[r < kWorldSize - 1 ? r : 0], v);
    float addend[kCount];
    Values<Element>::unpack(v, addend);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] += addend[i];
  }
  return Values<Element>::pack(sum);
}

// An address that is not aligned, or a last vector that is not full: element by element.
template <typename Bits>
__device__ __noinline__ uint4 load_elements(const char* address, int64_t num_bytes) {
  constexpr int kPerWord = 4 / sizeof(Bits);
  const Bits* elements = reinterpret_cast<const Bits*>(address);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < static_cast<int>(kVectorBytes / sizeof(Bits)); ++i) {
    if (i * static_cast<int64_t>(sizeof(Bits)) < num_bytes) {
      words[i / kPerWord] |= static_cast<uint32_t>(elements[i]) << (i % kPerWord * 16);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <typename Bits>
__device__ __noinline__ void store_elements(char* address, int64_t num_bytes, uint4 v) {
  constexpr int kPerWord = 4 / sizeof(Bits);
  Bits* elements = reinterpret_cast<Bits*>(address);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < static_cast<int>(kVectorBytes / sizeof(Bits)); ++i) {
    if (i * static_cast<int64_t>(sizeof(Bits)) < num_bytes) {
      elements[i] = static_cast<Bits>(words[i / kPerWord] >> (i % kPerWord * 16));
    }
  }
}

template <typename Element>
using BitsOf = std::conditional_t<sizeof(Element) == 4, uint32_t, uint16_t>;

// Vector `index` of the input; what lies past the message's end is zeros.
template <typename Element>
__device__ __forceinline__ uint4 load_vector(const AllReduceParams& params, int64_t index) {
  const int64_t offset = index * kVectorBytes;
  const char* address = static_cast<const char*>(params.input) + offset;
  const int64_t num_bytes = params.num_bytes - offset;
  return params.is_aligned && num_bytes >= kVectorBytes
             ? stable_common::load_16_bytes(address)
             : load_elements<BitsOf<Element>>(address, num_bytes);
}

template <typename Element>
__device__ __forceinline__ void store_vector(const AllReduceParams& params, int64_t index,
                                             uint4 v) {
  const int64_t offset = index * kVectorBytes;
  char* address = static_cast<char*>(params.output) + offset;
  const int64_t num_bytes = params.num_bytes - offset;
  if (params.is_aligned && num_bytes >= kVectorBytes) {
    *reinterpret_cast<uint4*>(address) = v;
  } else {
    store_elements<BitsOf<Element>>(address, num_bytes, v);
  }
}

}  // namespace custom_ar::device
