// Orders the large calls of a device, whatever object and package they belong to.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>

#include "stable_common/cuda_check.h"
#include "stable_common/stream_order.h"

namespace stable_common {

// A grid that fills a GPU and waits for a peer keeps every other grid out, also one that a peer
// waits for meanwhile. Calls of two objects (communicators, workspaces) on two streams so wait for
// each other, if each is resident on one of two GPUs. Large calls therefore run one after the
// other, in the order in which the host makes them. Small calls run beside them, in any order: all
// of them are resident at once, those of one object and, of every other, a call and the one after
// it.
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

  // An object makes calls on the device from now on.
  void add_object(int device_index) { of(device_index).num_objects.fetch_add(1); }

  // No more, and what it called has ended: its streams may go.
  void remove_object(int device_index) {
    Device& device = of(device_index);
    const std::lock_guard lock(device.mutex);
    device.num_objects.fetch_sub(1);
    if (cudaDeviceSynchronize() == cudaSuccess) device.streams.forget();
  }

  // Calls launch(), which launches a grid of `num_threads` on `stream`, after the last large call
  // of another stream if this one is large. `resident_threads` of such grids fit the device.
  template <typename Launch>
  void run(int device_index, cudaStream_t stream, int64_t num_threads, int64_t resident_threads,
           const Launch& launch) {
    Device& device = of(device_index);
    const int64_t num_objects = device.num_objects.load(std::memory_order_relaxed);
    if (num_objects < 2 || (2 * num_objects - 1) * num_threads <= resident_threads) {
      launch();
      return;
    }
    const std::lock_guard lock(device.mutex);
    const bool is_capturing = device.streams.begin_call(stream);
    launch();
    if (!is_capturing) device.streams.end_call(stream);
  }

 private:
  static constexpr size_t kMaxDevices = 64;
  struct Device {
    std::mutex mutex;  // guards the order
    StreamOrder streams;
    std::atomic<int64_t> num_objects{0};
  };

  Device& of(int device_index) { return devices_[static_cast<size_t>(device_index) % kMaxDevices]; }

  static LargeCalls*& current() {
    static LargeCalls* pointer = new LargeCalls;  // outlives every static destructor
    return pointer;
  }

  uint64_t layout_ = kLayout;
  std::array<Device, kMaxDevices> devices_;
};

}  // namespace stable_common
