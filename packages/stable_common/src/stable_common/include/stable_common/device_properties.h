// What a launcher needs to know of a device, read once per device and process.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>

namespace stable_common {

struct DeviceProperties {
  int compute_capability = 0;  // 10 * major + minor: 90 is Hopper
  int num_multiprocessors = 0;

  bool has_programmatic_dependent_launch() const { return compute_capability >= 90; }
};

// Fills `properties` for `device_index`. Reading attributes is legal during stream capture.
inline cudaError_t get_device_properties(int device_index, DeviceProperties* properties) {
  constexpr int kMaxCachedDevices = 64;
  // A slot is written before its flag is released; two threads that race write the same values to
  // their own copies, and only the first publishes.
  struct Slot {
    std::atomic<int> state{0};  // 0 empty, 1 being written, 2 ready
    DeviceProperties value;
  };
  static std::array<Slot, kMaxCachedDevices> slots;

  Slot* slot =
      device_index >= 0 && device_index < kMaxCachedDevices ? &slots[device_index] : nullptr;
  if (slot != nullptr && slot->state.load(std::memory_order_acquire) == 2) {
    *properties = slot->value;
    return cudaSuccess;
  }

  int major = 0;
  int minor = 0;
  DeviceProperties read;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } queries[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &read.num_multiprocessors},
  };
  for (const auto& query : queries) {
    const cudaError_t error = cudaDeviceGetAttribute(query.value, query.attribute, device_index);
    if (error != cudaSuccess) return error;
  }
  read.compute_capability = 10 * major + minor;
  *properties = read;

  int empty = 0;
  if (slot != nullptr && slot->state.compare_exchange_strong(empty, 1)) {
    slot->value = read;
    slot->state.store(2, std::memory_order_release);
  }
  return cudaSuccess;
}

}  // namespace stable_common
