// What ranks share: the layout of the buffer that each rank lends to its peers. Known to host and
// device.
#pragma once

#include <cstdint>

#include "stable_common/peer_call.h"

namespace custom_ar {

constexpr int kMaxWorldSize = 8;

// What a call's descriptor says beside its number.
constexpr int kDescriptorElementBits = 36;
constexpr int kDescriptorTypeShift = kDescriptorElementBits;
constexpr int kDescriptorAlgorithmShift = kDescriptorTypeShift + 2;
static_assert(kDescriptorAlgorithmShift + 2 == stable_common::kDescriptorCallShift);

// The start of a shared buffer, which is zeros when it is allocated, before any peer can know of
// it.
using SharedHeader = stable_common::CallHeader<kMaxWorldSize, 0, 4>;

// Two slots follow the header, for even and for odd calls.
constexpr int64_t kHeaderBytes = 4096;
constexpr int kNumSlots = 2;
static_assert(sizeof(SharedHeader) <= kHeaderBytes);

}  // namespace custom_ar
