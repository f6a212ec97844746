// The device side of calls that several ranks make together: memory that peers write, the numbering
// of calls, and how a rank that waits in vain stops.
//
// `Params` is what a kernel was launched with, and must have:
//   using Header = CallHeader<...>;
//   Header* header(int rank) const;  of every rank below Header::kMaxRanks; null if there is none
//   int rank;                        this one
//   uint64_t descriptor;             of the call, without its number
//   uint64_t timeout_ns;
//   FailureRecord* failure_record;   as the device maps it
#pragma once

#include <cstdint>

#include "stable_common/peer_call.h"

namespace stable_common {

// Memory that other GPUs write or read. Relaxed at system scope: no cache that a peer cannot reach
// answers, and each word arrives whole.
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

__device__ __forceinline__ void store_shared(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Atomics on this rank's memory. CUDA's own take any address, which may be of shared memory: a
// thread then waits for the result to learn which it was, even if it needs none.
__device__ __forceinline__ uint64_t fetch_add(uint64_t* address, uint64_t value) {
  uint64_t before;
  asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(address), "l"(value)
               : "memory");
  return before;
}

__device__ __forceinline__ void add(uint64_t* address, uint64_t value) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// Stores `desired` if there is `expected`. Returns what was there.
__device__ __forceinline__ uint64_t compare_exchange(uint64_t* address, uint64_t expected,
                                                     uint64_t desired) {
  uint64_t before;
  asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;"
               : "=l"(before)
               : "l"(address), "l"(expected), "l"(desired)
               : "memory");
  return before;
}

// Keeps what the compiler does with 64 bits on its side of this: what they come from before, and
// what comes of them after. To look at something loaded is to wait for it.
template <typename Value>
__device__ __forceinline__ void keep_here(Value& value) {
  static_assert(sizeof(Value) == sizeof(uint64_t));
  asm volatile("" : "+l"(value));
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

template <typename Params>
__device__ __forceinline__ uint64_t load_header_word(const uint64_t* address) {
  return Params::Header::from_stored(load_shared(address));
}

template <typename Params>
__device__ __forceinline__ void store_header_word(uint64_t* address, uint64_t value) {
  store_shared(address, Params::Header::to_stored(value));
}

template <typename Params>
__device__ __forceinline__ uint64_t descriptor_of(const Params& params, uint32_t call) {
  return params.descriptor | static_cast<uint64_t>(call) << kDescriptorCallShift;
}

// Tells the host of a failure.
__device__ __forceinline__ void write_record(FailureRecord* record, uint64_t failure,
                                             uint64_t descriptor, uint64_t detail) {
  store_shared(&record->descriptor, descriptor);
  store_shared(&record->detail, detail);
  __threadfence_system();
  store_shared(&record->failure, failure);
}

// Records a failure, the first of all threads and calls, here, for the host and at the peers.
// `detail` is that of FailureRecord.
template <typename Params>
__device__ __noinline__ void fail(const Params& params, FailureKind kind, uint32_t ranks,
                                  uint32_t call, uint64_t detail) {
  using Header = typename Params::Header;
  Header* own = params.header(params.rank);
  const uint64_t none = Header::to_stored(0);
  if (compare_exchange(&own->is_failing, none, Header::to_stored(1)) != none) return;
  const uint64_t failure = pack_failure(kind, ranks, call);
  store_header_word<Params>(&own->failed_descriptor, descriptor_of(params, call));
  store_header_word<Params>(&own->failure_detail, detail);
  __threadfence();
  store_header_word<Params>(&own->failure, failure);
  write_record(params.failure_record, failure, descriptor_of(params, call), detail);
  // A peer's failure is passed on as it is, so that every rank learns what happened first.
  const uint64_t told = kind == FailureKind::kPeerGaveUp ? detail : failure;
#pragma unroll 1
  for (int r = 0; r < Header::kMaxRanks; ++r) {
    Header* peer = r != params.rank ? params.header(r) : nullptr;
    if (peer != nullptr) store_header_word<Params>(&peer->failures[params.rank], told);
  }
}

// Tells the host of this rank's failure, if there is any, once more: for calls whose record is not
// the one that fail() wrote to.
template <typename Params>
__device__ __forceinline__ void report_failure(const Params& params) {
  const auto* own = params.header(params.rank);
  uint64_t failure = 0;
  do {
    failure = load_header_word<Params>(&own->failure);
    // Who is about to write it does so in no time.
  } while (failure == 0 && load_header_word<Params>(&own->is_failing) != 0);
  if (failure == 0) return;
  __threadfence();
  write_record(params.failure_record, failure, load_header_word<Params>(&own->failed_descriptor),
               load_header_word<Params>(&own->failure_detail));
}

// What a thread that has waited for a while does: returns the time to wait until, or zero to stop.
// The first time, when `deadline` is zero, that is `timeout` nanoseconds from now.
template <typename Params>
__device__ __noinline__ uint64_t check_wait(const Params& params, uint32_t call, uint32_t absent,
                                            uint64_t timeout, uint64_t deadline) {
  constexpr uint64_t kStop = 0;
  using Header = typename Params::Header;
  const Header* own = params.header(params.rank);
  if (load_header_word<Params>(&own->failure) != 0) return kStop;
  uint32_t missing = 0;
  uint32_t closed = 0;
#pragma unroll 1
  for (int r = 0; r < Header::kMaxRanks; ++r) {
    if (r == params.rank || params.header(r) == nullptr) continue;
    // Who failed in a later call has done all of this one, unless two ran at once.
    const uint64_t failure = load_header_word<Params>(&own->failures[r]);
    if (failure != 0 && (static_cast<int32_t>(failed_call(failure) - call) <= 0 ||
                         failure_kind(failure) == FailureKind::kConcurrentCall)) {
      fail(params, FailureKind::kPeerGaveUp, 1u << r, call, failure);
      return kStop;
    }
    // A peer closes once all that it sent is here: what it announced is read after that.
    const bool has_closed = load_header_word<Params>(&own->closed[r]) != 0;
    if (has_closed) __threadfence_system();
    const uint64_t announced =
        load_header_word<Params>(&own->descriptors[Header::descriptor_slot(call)][r]);
    if (((announced ^ descriptor_of(params, call)) & kDescriptorCallMask) != 0) {
      missing |= 1u << r;
      if (has_closed) closed |= 1u << r;
    }
  }
  if (closed != 0) {
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

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kLooksPerCheck = 64;  // some 30 us

// Bounds a wait. A thread that finds nothing to have arrived asks keep_waiting() before it looks
// again.
template <typename Params>
class Patience {
 public:
  __device__ Patience(const Params& params, uint32_t call, uint64_t timeout)
      : params_(params), timeout_(timeout), call_(call) {}

  // `absent` is the ranks whose data this thread lacks.
  __device__ __forceinline__ bool keep_waiting(uint32_t absent) {
    if (++looks_ % kLooksPerCheck != 0) return true;
    deadline_ = check_wait(params_, call_, absent, timeout_, deadline_);
    return deadline_ != 0;
  }

  // The same for a warp that waits as one: all of its lanes call this, and get one answer.
  __device__ __forceinline__ bool warp_keeps_waiting(uint32_t absent) {
    if (++looks_ % kLooksPerCheck != 0) return true;
    if (threadIdx.x % 32 == 0) {
      deadline_ = check_wait(params_, call_, absent, timeout_, deadline_);
    }
    deadline_ = __shfl_sync(kAllLanes, static_cast<unsigned long long>(deadline_), 0);
    return deadline_ != 0;
  }

 private:
  const Params& params_;
  uint64_t timeout_;
  uint64_t deadline_ = 0;
  uint32_t call_;
  uint32_t looks_ = 0;
};

// This block's part of one call, in the units of CallHeader::begun. The parts of all blocks add up
// to 2^32.
__device__ __forceinline__ uint64_t block_part() {
  constexpr uint64_t kCall = uint64_t{1} << 32;
  // kCall / gridDim.x, by a division of 32 bits: one of 64 takes hundreds of cycles.
  constexpr uint32_t kMost = 0xffffffffu;
  const uint32_t num_blocks = gridDim.x;
  const uint64_t part =
      uint64_t{kMost / num_blocks} + (kMost % num_blocks == num_blocks - 1 ? 1 : 0);
  return blockIdx.x == 0 ? kCall - part * (num_blocks - 1) : part;
}

// The failures that this rank knows of: its own, and what a peer met that then does not take part
// any more. By the first warp of a block, each lane of which reads its own peer's.
template <typename Params>
struct Failures {
  uint64_t own;
  uint64_t peer;

  __device__ explicit Failures(const Params& params) {
    const auto* header = params.header(params.rank);
    own = load_header_word<Params>(&header->failure);
    peer = threadIdx.x < Params::Header::kMaxRanks
               ? load_header_word<Params>(&header->failures[threadIdx.x])
               : 0;
  }

  // Takes over a peer's. Returns whether there is any.
  __device__ bool adopt(const Params& params, uint32_t call) const {
    if (peer != 0) fail(params, FailureKind::kPeerGaveUp, 1u << threadIdx.x, call, peer);
    return own != 0 || peer != 0;
  }
};

// What a block knows of the call it is part of.
struct PeerCall {
  uint32_t number;
  // Before the block began. After wait_for_previous_grid(), the first warp of a block is to adopt
  // Failures: not sooner, since the call before may yet succeed.
  bool has_failed;
};

// Numbers the call. Every thread of the block calls this, before wait_for_previous_grid(): the
// blocks of earlier calls have done so before they allowed this grid to start.
template <typename Params>
__device__ __forceinline__ PeerCall begin_call(const Params& params) {
  __shared__ PeerCall call;
  if (threadIdx.x < 32) {
    const Failures<Params> failures(params);
    uint32_t number = 0;
    if (threadIdx.x == 0) {
      auto* own = params.header(params.rank);
      const uint64_t begun = fetch_add(&own->begun, block_part());
      number = static_cast<uint32_t>(Params::Header::from_stored(begun) >> 32) + 1;
    }
    number = __shfl_sync(kAllLanes, number, 0);
    const bool has_failed = __any_sync(kAllLanes, failures.own != 0 || failures.peer != 0);
    if (threadIdx.x == 0) call = {number, has_failed};
  }
  __syncthreads();
  return call;
}

// Tells `peer` what this call is. By one thread for each peer, after wait_for_previous_grid().
template <typename Params>
__device__ __forceinline__ void announce_call(const Params& params,
                                              typename Params::Header* peer_header, uint32_t call) {
  const uint32_t slot = Params::Header::descriptor_slot(call);
  store_header_word<Params>(&peer_header->descriptors[slot][params.rank],
                            descriptor_of(params, call));
}

// Takes the call's number for this grid. That it is taken, or that the call before has not
// completed, means that two grids run at once; what is read here is looked at later, in is_alone().
// (Other blocks may have completed their parts of this call.) By one thread of a grid.
template <typename Params>
struct Claim {
  using Header = typename Params::Header;

  // As they are stored: to look at them here would be to wait for them.
  uint64_t stored_completed;
  uint64_t stored_claimed;

  static __device__ __forceinline__ Claim take(Header* own, uint32_t call) {
    const uint64_t completed = load_shared(&own->completed);
    return {completed,
            compare_exchange(&own->claimed, Header::to_stored(call - 1), Header::to_stored(call))};
  }
  // What a thread holds that takes none.
  static __device__ __forceinline__ Claim none(uint32_t call) {
    const uint64_t before = call - 1;
    return {Header::to_stored(before << 32), Header::to_stored(before)};
  }

  __device__ __forceinline__ bool is_alone(uint32_t call) const {
    uint64_t completed = stored_completed;
    uint64_t claimed = stored_claimed;
    keep_here(completed);
    keep_here(claimed);
    return static_cast<uint32_t>(Header::from_stored(completed) >> 32) == call - 1 &&
           static_cast<uint32_t>(Header::from_stored(claimed)) == call - 1;
  }
};

// Counts this block's part of the call, block_part(), as completed. By one thread, after all of the
// block's.
template <typename Params>
__device__ __forceinline__ void end_call(typename Params::Header* own, uint64_t part) {
  add(&own->completed, part);
}

}  // namespace stable_common
