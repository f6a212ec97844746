// Calls that the GPUs of several ranks make together: what ranks tell each other beside their data,
// and how a failure is recorded. Known to host and device; the device side is in peer_call.cuh.
#pragma once

#include <cstdint>

namespace stable_common {

// A call is announced to the peers by one 64-bit word, its descriptor, so that it arrives whole:
// its number in the upper bits, and what all ranks must agree on, which is the kernel's to choose.
constexpr int kDescriptorCallShift = 40;
constexpr uint64_t kDescriptorCallMask = ~uint64_t{0} << kDescriptorCallShift;

enum class FailureKind : uint32_t {
  kNone = 0,
  kTimeout,         // `ranks` did not take part, or stopped in the middle
  kDisagreement,    // the rank in `ranks` calls for something else
  kConcurrentCall,  // this rank has two calls running at once
  kPeerClosed,      // `ranks` had closed when this rank called
  kOverCapacity,    // the call needs more of the shared buffers than there is
  kPeerGaveUp,      // the rank in `ranks` met a failure
};

// A failure in one word: kind, ranks as a bit mask, and the lowest bits of the call's number. Zero
// is none.
constexpr int kFailureRanksShift = 8;
constexpr int kFailureRanksBits = 16;
constexpr int kFailureCallShift = 32;

constexpr uint64_t pack_failure(FailureKind kind, uint32_t ranks, uint32_t call) {
  return static_cast<uint64_t>(kind) | uint64_t{ranks} << kFailureRanksShift |
         uint64_t{call} << kFailureCallShift;
}

constexpr FailureKind failure_kind(uint64_t failure) {
  return static_cast<FailureKind>(failure & 0xff);
}
constexpr uint32_t failed_ranks(uint64_t failure) {
  return static_cast<uint32_t>(failure >> kFailureRanksShift) & ((1u << kFailureRanksBits) - 1);
}
constexpr uint32_t failed_call(uint64_t failure) {
  return static_cast<uint32_t>(failure >> kFailureCallShift);
}

// The first failure of a rank, in host memory that the device can write.
struct FailureRecord {
  uint64_t failure;     // written last
  uint64_t descriptor;  // of the call that failed
  // kDisagreement: the descriptor that the other rank announced. kPeerGaveUp: the failure that it
  // met. kOverCapacity: what there is.
  uint64_t detail;
};

// What a rank lends to its peers beside the room for data. `kEmpty` is what fresh memory is full
// of; each word is stored as its value plus that, so that fresh memory reads as zeros and nothing
// needs to be initialised that a peer may already have written.
//
// Descriptors of kSlots calls in a row have places of their own, a power of two. A call is
// announced while peers may still be in the call before, so two are enough for ranks that look
// whether the call before has failed, and then announce. One that has failed in call n may have
// begun call n + 1, and a peer may still be in call n - 1: to announce without a look takes three,
// and so four.
template <int kRanks, uint64_t kEmpty, int kSlots = 2>
struct CallHeader {
  static constexpr int kMaxRanks = kRanks;
  static_assert(kMaxRanks <= kFailureRanksBits);

  static_assert((kSlots & (kSlots - 1)) == 0);
  static constexpr uint32_t descriptor_slot(uint32_t call) { return call % kSlots; }

  static constexpr uint64_t to_stored(uint64_t value) { return value + kEmpty; }
  static constexpr uint64_t from_stored(uint64_t word) { return word - kEmpty; }

  // Written by peers, each at its own rank's index.
  uint64_t descriptors[kSlots][kRanks];
  uint64_t failures[kRanks];
  uint64_t closed[kRanks];  // the peer no longer writes here

  // Written by the owner's kernels alone.
  //
  // Calls begun and calls completed, in units of 2^32: each block of a call adds its part, so that
  // no block needs to know whether it is the last. What a block finds in `begun` as it adds its own
  // part is the number of calls before its own, plus a fraction.
  alignas(128) uint64_t begun;
  uint64_t completed;
  uint64_t claimed;  // the last call that a grid has taken for its own, in 32 bits
  // The first failure: whether someone writes it, and what FailureRecord holds.
  uint64_t is_failing;
  uint64_t failed_descriptor;
  uint64_t failure_detail;
  uint64_t failure;  // written last
};

}  // namespace stable_common
