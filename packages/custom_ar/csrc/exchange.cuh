// How ranks exchange data: pushed into the peers' buffers, in words that say themselves that they
// have arrived; and how a rank that waits in vain stops.
#pragma once

#include <cstdint>

#include "all_reduce.h"

namespace custom_ar::device {

// Memory that other GPUs write or read. Relaxed at system scope: no cache that a peer cannot reach
// answers, and each 32-bit word arrives whole.
__device__ __forceinline__ uint4 load_shared_vector(const void* address) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_vector(void* address, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ uint64_t load_shared(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_shared(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

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

__device__ __forceinline__ uint64_t descriptor_of(const AllReduceParams& params, uint32_t call) {
  return params.descriptor | static_cast<uint64_t>(call) << kDescriptorCallShift;
}

// Records a failure, once for all threads and calls, here, for the host and at the peers.
__device__ __noinline__ void fail(const AllReduceParams& params, FailureKind kind, uint32_t ranks,
                                  uint32_t call, uint64_t peer_word) {
  SharedHeader* own = params.buffers[params.rank];
  const uint64_t failure = pack_failure(kind, ranks, call);
  if (atomicCAS(reinterpret_cast<unsigned long long*>(&own->failure), 0ull, failure) != 0) return;
  FailureRecord* record = params.failure_record;
  store_shared(&record->own_descriptor, descriptor_of(params, call));
  store_shared(kind == FailureKind::kPeerGaveUp ? &record->peer_failure : &record->peer_descriptor,
               peer_word);
  __threadfence_system();
  store_shared(&record->failure, failure);
  // A peer's failure is passed on as it is, so that every rank learns what happened first.
  const uint64_t told = kind == FailureKind::kPeerGaveUp ? peer_word : failure;
  for (int r = 0; r < kMaxWorldSize; ++r) {
    if (r != params.rank && params.buffers[r] != nullptr) {
      store_shared(&params.buffers[r]->failures[params.rank], told);
    }
  }
}

// What a thread that has waited for a while does: returns the time to wait until, or zero to stop.
// The first time, when `deadline` is zero, that is `timeout` nanoseconds from now.
__device__ __noinline__ uint64_t check_wait(const AllReduceParams& params, uint32_t call,
                                            uint32_t absent, uint64_t timeout, uint64_t deadline) {
  constexpr uint64_t kStop = 0;
  constexpr uint64_t kLastLook = 1;  // a time that has passed
  const SharedHeader* own = params.buffers[params.rank];
  if (load_shared(&own->failure) != 0) return kStop;
  uint32_t missing = 0;
  uint32_t closed = 0;
  for (int r = 0; r < kMaxWorldSize; ++r) {
    if (r == params.rank || params.buffers[r] == nullptr) continue;
    if (const uint64_t failure = load_shared(&own->failures[r])) {
      fail(params, FailureKind::kPeerGaveUp, 1u << r, call, failure);
      return kStop;
    }
    const uint64_t announced = load_shared(&own->descriptors[call % 2][r]);
    if (((announced ^ descriptor_of(params, call)) & kDescriptorCallMask) != 0) missing |= 1u << r;
    if (load_shared(&own->closed[r]) != 0) closed |= 1u << r;
  }
  closed &= missing;
  if (closed != 0) {
    // What it sent before it closed is there by now.
    if (deadline != kLastLook) return kLastLook;
    fail(params, FailureKind::kPeerClosed, closed, call, 0);
    return kStop;
  }
  const uint64_t now = nanoseconds();
  if (deadline == 0) return now + timeout;
  if (now < deadline) return deadline;
  // Those that have not begun this call are to be named; else those that stopped in its middle.
  fail(params, FailureKind::kTimeout, missing != 0 ? missing : absent, call, 0);
  return kStop;
}

// Bounds a wait. A thread that finds nothing to have arrived asks keep_waiting() before it looks
// again.
class Patience {
 public:
  __device__ Patience(const AllReduceParams& params, uint32_t call, uint64_t timeout)
      : params_(params), timeout_(timeout), call_(call) {}

  // `absent` is the ranks whose data this thread lacks.
  __device__ __forceinline__ bool keep_waiting(uint32_t absent) {
    constexpr uint32_t kLooksPerCheck = 64;  // some 30 us
    if (++looks_ % kLooksPerCheck != 0) return true;
    deadline_ = check_wait(params_, call_, absent, timeout_, deadline_);
    return deadline_ != 0;
  }

 private:
  const AllReduceParams& params_;
  uint64_t timeout_;
  uint64_t deadline_ = 0;
  uint32_t call_;
  uint32_t looks_ = 0;
};

}  // namespace custom_ar::device
