#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "stable_common/dispatch.h"

// Of each of `n` pairs of 16-bit values: bytes[2i], bytes[2i + 1] are E4M3, exponents[i] is
// e4m3_block_exponent of the larger absolute value. `n` is a multiple of 4.
cudaError_t launch_convert(const void* values, uint8_t* bytes, int32_t* exponents, int n,
                           stable_common::Float16Type type, bool programmatic_dependent_launch,
                           cudaStream_t stream);
