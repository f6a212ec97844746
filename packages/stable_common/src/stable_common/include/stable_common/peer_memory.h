// Device memory that processes share: allocated and lent here, or lent by a peer and mapped.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "stable_common/allocate.h"
#include "stable_common/cuda_check.h"
#include "stable_common/driver_api.h"
#include "stable_common/tensor_check.h"

namespace stable_common {

struct PeerMemoryRegistry {
  struct Entry {
    int64_t num_owned_bytes = 0;  // 0: of another process
    int num_opened = 0;           // the driver maps a handle once, and counts
  };
  std::mutex mutex;
  std::unordered_map<void*, Entry> entries;

  static PeerMemoryRegistry& instance() {
    static PeerMemoryRegistry* const registry =
        new PeerMemoryRegistry;  // outlives every static destructor
    return *registry;
  }
};

// What the driver maps for another process, at least: a smaller allocation is part of such a block,
// and its handle would let the peer write to all of it.
constexpr int64_t kSharedGranularity = int64_t{2} << 20;

// Memory on the current device, each 32-bit word of it `fill`, and the handle by which another
// process maps it. At least `num_bytes`, rounded up to kSharedGranularity: shared_bytes() has the
// size, and has the same for whoever maps it.
inline void* allocate_shared(const char* op, int64_t num_bytes, uint32_t fill,
                             cudaIpcMemHandle_t* handle) {
  check_allocated(num_bytes <= INT64_MAX - kSharedGranularity, op, num_bytes, " bytes");
  num_bytes = (num_bytes + kSharedGranularity - 1) / kSharedGranularity * kSharedGranularity;
  void* address = nullptr;
  const cudaError_t error = cudaMalloc(&address, static_cast<size_t>(num_bytes));
  if (error == cudaErrorMemoryAllocation) (void)cudaGetLastError();
  check_allocated(error != cudaErrorMemoryAllocation, op, num_bytes,
                  " bytes for peers to map: CUDA error: out of memory");
  STABLE_CUDA_CHECK(error);
  try {
    if (fill == 0) {
      STABLE_CUDA_CHECK(cudaMemset(address, 0, static_cast<size_t>(num_bytes)));
    } else {
      static const auto set_words = driver_function<decltype(&cuMemsetD32)>("cuMemsetD32", 3020);
      if (set_words == nullptr) throw std::runtime_error("the driver lacks cuMemsetD32");
      STABLE_CU_CHECK(set_words(reinterpret_cast<CUdeviceptr>(address), fill,
                                static_cast<size_t>(num_bytes) / sizeof(fill)));
    }
    STABLE_CUDA_CHECK(cudaIpcGetMemHandle(handle, address));
    // The fill must be there before anyone can learn of the memory.
    STABLE_CUDA_CHECK(cudaDeviceSynchronize());
  } catch (...) {
    (void)cudaFree(address);
    throw;
  }
  PeerMemoryRegistry& registry = PeerMemoryRegistry::instance();
  const std::lock_guard lock(registry.mutex);
  registry.entries[address] = {.num_owned_bytes = num_bytes};
  return address;
}

// Maps the memory of another process on the current device.
inline void* open_shared(const cudaIpcMemHandle_t& handle) {
  void* address = nullptr;
  STABLE_CUDA_CHECK(cudaIpcOpenMemHandle(&address, handle, cudaIpcMemLazyEnablePeerAccess));
  PeerMemoryRegistry& registry = PeerMemoryRegistry::instance();
  const std::lock_guard lock(registry.mutex);
  ++registry.entries[address].num_opened;
  return address;
}

// Closes one mapping of `address` if open_shared() made it; anything else is left alone.
inline void close_if_opened(void* address) {
  {
    PeerMemoryRegistry& registry = PeerMemoryRegistry::instance();
    const std::lock_guard lock(registry.mutex);
    const auto found = registry.entries.find(address);
    if (found == registry.entries.end() || found->second.num_opened == 0) return;
    if (--found->second.num_opened == 0) registry.entries.erase(found);
  }
  STABLE_CUDA_CHECK(cudaIpcCloseMemHandle(address));
}

// Frees what allocate_shared() returned, or closes what open_shared() did. `expected` says where
// the argument `name` of the op must come from. CUDA allows an allocation to be freed only once no
// process maps it any more: that is for the caller to know.
inline void free_shared(const char* op, const char* name, const char* expected, void* address) {
  bool is_owned = false;
  {
    PeerMemoryRegistry& registry = PeerMemoryRegistry::instance();
    const std::lock_guard lock(registry.mutex);
    const auto found = registry.entries.find(address);
    check(found != registry.entries.end(), op, name, " must be what ", expected,
          " returned and not be freed yet, got ", reinterpret_cast<uintptr_t>(address));
    is_owned = found->second.num_owned_bytes != 0;
    if (is_owned) registry.entries.erase(found);
  }
  if (is_owned) {
    STABLE_CUDA_CHECK(cudaFree(address));
  } else {
    close_if_opened(address);
  }
}

// The bytes from `address` to the end of what allocate_shared() of this process returned; 0 if it
// is elsewhere.
inline int64_t allocated_bytes(const void* address) {
  PeerMemoryRegistry& registry = PeerMemoryRegistry::instance();
  const std::lock_guard lock(registry.mutex);
  const auto* byte = static_cast<const char*>(address);
  for (const auto& [begin, entry] : registry.entries) {
    const char* const end = static_cast<const char*>(begin) + entry.num_owned_bytes;
    if (byte >= begin && byte < end) return end - byte;
  }
  return 0;
}

// The bytes from `address` to the end of its allocation: of what allocate_shared() returned, the
// same in the process that allocated it and in those that map it.
inline int64_t shared_bytes(const char* op, void* address) {
  // Asked first: the driver need not be, and tools may let it answer with more.
  if (const int64_t bytes = allocated_bytes(address)) return bytes;
  static const auto get_range =
      driver_function<decltype(&cuMemGetAddressRange)>("cuMemGetAddressRange", 3020);
  check(get_range != nullptr, op, "the driver lacks cuMemGetAddressRange");
  CUdeviceptr base = 0;
  size_t size = 0;
  STABLE_CU_CHECK(get_range(&base, &size, reinterpret_cast<CUdeviceptr>(address)));
  return static_cast<int64_t>(base + size - reinterpret_cast<CUdeviceptr>(address));
}

// The handle as a tensor that Python can send: uint8 [64] on the CPU.
inline Tensor handle_tensor(const cudaIpcMemHandle_t& handle) {
  const int64_t sizes[] = {sizeof(handle)};
  const int64_t strides[] = {1};
  AtenTensorHandle tensor = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, sizes, strides, aoti_torch_dtype_uint8(),
                                                  aoti_torch_device_type_cpu(), 0, &tensor));
  Tensor result(tensor);
  std::memcpy(result.data_ptr(), &handle, sizeof(handle));
  return result;
}

inline cudaIpcMemHandle_t tensor_handle(const Argument& argument) {
  cudaIpcMemHandle_t handle;
  argument.is_on_cpu()
      .has_dtype({ScalarType::Byte})
      .has_shape({static_cast<int64_t>(sizeof(handle))})
      .is_dense_from(0);
  std::memcpy(&handle, argument.tensor().data_ptr(), sizeof(handle));
  return handle;
}

}  // namespace stable_common
