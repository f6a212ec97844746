// How ranks exchange data: pushed into the peers' buffers, in words that say themselves that they
// have arrived.
#pragma once

#include <cstdint>

#include "all_reduce.h"
#include "stable_common/peer_call.cuh"

namespace custom_ar::device {

using stable_common::load_shared_vector;
using stable_common::store_shared_vector;
using Patience = stable_common::Patience<AllReduceParams>;

// On the way, a word is its complement, and zero means that nothing has come. The one word whose
// complement is zero is a NaN in each of the three types, and is sent as the NaN next to it, so
// that every value but a NaN's payload arrives as it was sent, signed zeros included.
__device__ __forceinline__ uint32_t encode(uint32_t word) { return max(~word, 1u); }

__device__ __forceinline__ uint4 encode(uint4 v) {
  return make_uint4(encode(v.x), encode(v.y), encode(v.z), encode(v.w));
}

__device__ __forceinline__ uint4 decode(uint4 v) { return make_uint4(~v.x, ~v.y, ~v.z, ~v.w); }

__device__ __forceinline__ bool has_arrived(uint4 v) {
  return v.x != 0 && v.y != 0 && v.z != 0 && v.w != 0;
}

constexpr uint32_t kNaNWord = 0xffffffffu;  // of fp32, and two of fp16 or bf16

// Where a rank's data lies in a peer's slot: ranks follow each other, the peer itself left out.
__device__ __forceinline__ int source_index(int source, int target) {
  return source - (source > target ? 1 : 0);
}

__device__ __forceinline__ char* slot_of(const AllReduceParams& params, int rank, uint32_t call) {
  return reinterpret_cast<char*>(params.buffers[rank]) + kHeaderBytes +
         (call % kNumSlots) * params.slot_bytes;
}

}  // namespace custom_ar::device
