// What ranks share: the layout of the buffer that each rank lends to its peers, and how a failure
// is recorded. Known to host and device.
#pragma once

#include <cstdint>

namespace custom_ar {

constexpr int kMaxWorldSize = 8;

// A call is announced to the peers by one 64-bit word, so that it arrives whole: its number, and
// what all ranks must agree on.
constexpr int kDescriptorElementBits = 36;
constexpr int kDescriptorTypeShift = kDescriptorElementBits;
constexpr int kDescriptorAlgorithmShift = kDescriptorTypeShift + 2;
constexpr int kDescriptorCallShift = kDescriptorAlgorithmShift + 2;
constexpr uint64_t kDescriptorCallMask = ~uint64_t{0} << kDescriptorCallShift;

enum class FailureKind : uint32_t {
  kNone = 0,
  kTimeout,         // `ranks` did not take part, or stopped in the middle
  kDisagreement,    // the rank in `ranks` reduces something else
  kConcurrentCall,  // this rank has two calls running at once
  kPeerClosed,      // `ranks` had closed when this rank called
  kPeerGaveUp,      // the rank in `ranks` met a failure
};

// A failure in one word: kind, ranks as a bit mask, and the lowest bits of the call's number. Zero
// is none.
constexpr int kFailureRanksShift = 8;
constexpr int kFailureCallShift = 32;

constexpr uint64_t pack_failure(FailureKind kind, uint32_t ranks, uint32_t call) {
  return static_cast<uint64_t>(kind) | uint64_t{ranks} << kFailureRanksShift |
         uint64_t{call} << kFailureCallShift;
}

// The first failure of a communicator, in host memory that the device can write.
struct FailureRecord {
  uint64_t failure;          // written last
  uint64_t own_descriptor;   // of the call that failed
  uint64_t peer_descriptor;  // kDisagreement: what the other rank announced
  uint64_t peer_failure;     // kPeerGaveUp: what the other rank met
};

// The start of a shared buffer. The whole buffer is zeros when it is allocated, before any peer can
// know of it, and is valid so: nothing needs to be initialised that a peer may already have
// written.
struct SharedHeader {
  // Written by peers, each at its own rank's index.
  uint64_t descriptors[2][kMaxWorldSize];  // by parity of the call
  uint64_t failures[kMaxWorldSize];
  uint32_t closed[kMaxWorldSize];  // the peer no longer writes here

  // Written by the owner's kernels alone.
  //
  // Calls begun and calls completed, in units of 2^32: each block of a call adds its part, so that
  // no block needs to know whether it is the last. What a block finds in `begun` as it adds its own
  // part is the number of calls before its own, plus a fraction.
  alignas(128) uint64_t begun;
  uint64_t completed;
  uint64_t failure;
  uint32_t claimed;  // the last call that a grid has taken for its own
};

// Two slots follow the header, for even and for odd calls.
constexpr int64_t kHeaderBytes = 4096;
constexpr int kNumSlots = 2;
static_assert(sizeof(SharedHeader) <= kHeaderBytes);

}  // namespace custom_ar
