#include "shared_memory.h"

#include <cuda.h>

#include <mutex>
#include <unordered_map>

#include "stable_common/cuda_check.h"
#include "stable_common/tensor_check.h"

namespace custom_ar {

namespace {

using stable_common::check;

struct Registry {
  struct Entry {
    int64_t num_owned_bytes = 0;  // 0: of another process
    int num_opened = 0;           // the driver maps a handle once, and counts
  };
  std::mutex mutex;
  std::unordered_map<void*, Entry> entries;
};

Registry& registry() {
  static Registry* const instance = new Registry;  // outlives every static destructor
  return *instance;
}

}  // namespace

void* allocate_shared(int64_t num_bytes, cudaIpcMemHandle_t* handle) {
  void* address = nullptr;
  STABLE_CUDA_CHECK(cudaMalloc(&address, static_cast<size_t>(num_bytes)));
  try {
    STABLE_CUDA_CHECK(cudaMemset(address, 0, static_cast<size_t>(num_bytes)));
    STABLE_CUDA_CHECK(cudaIpcGetMemHandle(handle, address));
    // The zeros must be there before anyone can learn of the memory.
    STABLE_CUDA_CHECK(cudaDeviceSynchronize());
  } catch (...) {
    (void)cudaFree(address);
    throw;
  }
  const std::lock_guard lock(registry().mutex);
  registry().entries[address] = {.num_owned_bytes = num_bytes};
  return address;
}

void* open_shared(const cudaIpcMemHandle_t& handle) {
  void* address = nullptr;
  STABLE_CUDA_CHECK(cudaIpcOpenMemHandle(&address, handle, cudaIpcMemLazyEnablePeerAccess));
  const std::lock_guard lock(registry().mutex);
  ++registry().entries[address].num_opened;
  return address;
}

void close_if_opened(void* address) {
  {
    const std::lock_guard lock(registry().mutex);
    const auto found = registry().entries.find(address);
    if (found == registry().entries.end() || found->second.num_opened == 0) return;
    if (--found->second.num_opened == 0) registry().entries.erase(found);
  }
  STABLE_CUDA_CHECK(cudaIpcCloseMemHandle(address));
}

void free_shared(const char* op, void* address) {
  bool is_owned = false;
  {
    const std::lock_guard lock(registry().mutex);
    const auto found = registry().entries.find(address);
    check(found != registry().entries.end(), op,
          "ptr must be what allocate_shared_buffer_and_handle or open_mem_handle returned and not "
          "be freed yet, got ",
          reinterpret_cast<uintptr_t>(address));
    is_owned = found->second.num_owned_bytes != 0;
    if (is_owned) registry().entries.erase(found);
  }
  if (is_owned) {
    STABLE_CUDA_CHECK(cudaFree(address));
  } else {
    close_if_opened(address);
  }
}

int64_t shared_bytes(const char* op, void* address) {
  {
    // Asked first, since the driver may have allocated more than it was asked for.
    const std::lock_guard lock(registry().mutex);
    const auto found = registry().entries.find(address);
    if (found != registry().entries.end() && found->second.num_owned_bytes != 0) {
      return found->second.num_owned_bytes;
    }
  }
  static const auto get_range =
      stable_common::driver_function<decltype(&cuMemGetAddressRange)>("cuMemGetAddressRange", 3020);
  check(get_range != nullptr, op, "the driver lacks cuMemGetAddressRange");
  CUdeviceptr base = 0;
  size_t size = 0;
  STABLE_CU_CHECK(get_range(&base, &size, reinterpret_cast<CUdeviceptr>(address)));
  return static_cast<int64_t>(base + size - reinterpret_cast<CUdeviceptr>(address));
}

}  // namespace custom_ar
