// Orders the large calls of a device, whatever object and package they belong to.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <mutex>

#include "stable_common/cuda_check.h"
#include "stable_common/device_properties.h"
#include "stable_common/stream_order.h"

namespace stable_common {

// A grid that fills a GPU and waits for a peer keeps every other grid out, also one that a peer
// waits for meanwhile. Two calls of different objects on two streams so wait for each other, if
// each is resident on one of two GPUs. Large calls therefore run one after the other, in the order
// in which the host makes them. Small calls run beside them: of two objects all fit at once, and
// for each the call that comes next.
//
// Shared by the libraries of all packages in a process: each has one of its own, and uses the one
// that the first of them announced.
class LargeCalls {
 public:
  // Of what libraries share: another layout gets another one.
  static constexpr uint64_t kLayout = 1;

  // This library's own until use() names another.
  static LargeCalls& instance() { return *current(); }

  static void use(LargeCalls* other) {
    if (other->layout_ == kLayout) current() = other;
  }

  // Whether a grid takes more than a fourth of what is resident at the least: 512 threads of 128
  // registers on a multiprocessor.
  static bool is_large(int64_t num_blocks, int threads_per_block, const DeviceProperties& device) {
    return 4 * num_blocks * threads_per_block > int64_t{512} * device.num_multiprocessors;
  }

  // Makes launches on `stream` wait for the last large call of another stream; launch() makes them.
  template <typename Launch>
  void run(int device_index, cudaStream_t stream, const Launch& launch) {
    Device& device = devices_[static_cast<size_t>(device_index) % kMaxDevices];
    const std::lock_guard lock(device.mutex);
    const bool is_capturing = device.streams.begin_call(stream);
    launch();
    if (!is_capturing) device.streams.end_call(stream);
  }

 private:
  static constexpr size_t kMaxDevices = 64;
  struct Device {
    std::mutex mutex;
    StreamOrder streams;
  };

  static LargeCalls*& current() {
    static LargeCalls* pointer = new LargeCalls;  // outlives every static destructor
    return pointer;
  }

  uint64_t layout_ = kLayout;
  std::array<Device, kMaxDevices> devices_;
};

}  // namespace stable_common
