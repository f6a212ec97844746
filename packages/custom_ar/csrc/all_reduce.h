// Launcher of the all-reduce kernels. No torch header here or below.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "shared_buffer.h"
#include "stable_common/device_properties.h"
#include "stable_common/element_type.h"

namespace custom_ar {

constexpr int kVectorBytes = 16;
constexpr int kMaxDataThreads = 512;
// The first warp of a block announces the call, checks that the peers announce the same, and keeps
// count; the others move data.
constexpr int kControlThreads = 32;

using stable_common::ElementType;

enum class Algorithm : uint32_t {
  kOneShot = 0,  // every rank sends its whole input to every peer, and sums for itself
  kTwoShot = 1,  // reduce-scatter, then all-gather
};

// How a call is cut. All ranks must choose alike.
struct AllReduceTuning {
  Algorithm algorithm = Algorithm::kOneShot;
  int num_blocks = 1;
  int threads_per_block = 64;  // that move data, a vector each at a time; up to kMaxDataThreads
  // Vectors that a thread sends ahead of the one that it waits for.
  int depth = 1;
};

// The tuning for a message of `num_bytes`. It depends on nothing else, so that all ranks get the
// same.
AllReduceTuning choose_tuning(int world_size, int64_t num_bytes);

// The same on at most `max_blocks` blocks, with more threads in each where that makes up for it.
AllReduceTuning limit_blocks(const AllReduceTuning& tuning, int max_blocks);

// The slot that lets every message of up to `max_bytes` pass in one piece, as choose_tuning() cuts
// it.
int64_t slot_bytes_for(int world_size, int64_t max_bytes);

// How many bytes of a message a slot can pass at once, a multiple of kVectorBytes.
int64_t bytes_per_piece(Algorithm algorithm, int world_size, int64_t slot_bytes);

struct AllReduceParams {
  using Header = SharedHeader;

  SharedHeader* buffers[kMaxWorldSize] = {};  // of all ranks, as this process maps them
  stable_common::FailureRecord* failure_record = nullptr;  // as the device maps it
  int64_t slot_bytes = 0;                                  // a multiple of kVectorBytes
  uint64_t timeout_ns = 0;
  int rank = 0;

  // What all ranks must agree on, a descriptor without the call's number; make_descriptor().
  uint64_t descriptor = 0;
  const void* input = nullptr;
  void* output = nullptr;   // may be the input
  int64_t num_bytes = 0;    // of this piece of the message, a multiple of the element's size
  bool is_aligned = false;  // input and output are, to kVectorBytes
  int depth = 1;

  constexpr SharedHeader* header(int r) const { return buffers[r]; }
};

uint64_t make_descriptor(ElementType type, Algorithm algorithm, int64_t num_elements);

// Reduces one piece: `params.num_bytes` must be in (0, bytes_per_piece()]. Never blocks. Returns
// what the launch returned.
cudaError_t launch_all_reduce(const AllReduceParams& params, ElementType type, int world_size,
                              const AllReduceTuning& tuning,
                              const stable_common::DeviceProperties& device, cudaStream_t stream);

// Loads every kernel that launch_all_reduce() can launch for `world_size` ranks onto the current
// device, so that no launch has to, and returns the most registers of a thread of theirs.
cudaError_t load_all_reduce_kernels(int world_size, int* max_registers);

}  // namespace custom_ar
