// Device memory that processes share: allocated and lent here, or lent by a peer and mapped.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace custom_ar {

// Zeroed memory on the current device, and the handle by which another process maps it.
void* allocate_shared(int64_t num_bytes, cudaIpcMemHandle_t* handle);

// Maps the memory of another process on the current device.
void* open_shared(const cudaIpcMemHandle_t& handle);

// Frees what allocate_shared() returned, or closes what open_shared() did.
void free_shared(const char* op, void* address);

// Closes one mapping of `address` if open_shared() made it; anything else is left alone.
void close_if_opened(void* address);

// The bytes of what allocate_shared() returned; of anything else, those from `address` to the end
// of its allocation.
int64_t shared_bytes(const char* op, void* address);

}  // namespace custom_ar
