// Launcher of the RMSNorm kernels. No torch header here or below.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "stable_common/device_properties.h"
#include "stable_common/element_type.h"
#include "stable_common/peer_call.h"

namespace minimax_rms {

constexpr int kMaxRanks = 16;
constexpr int kVectorBytes = 16;

using stable_common::ElementType;

// A rank's communication buffer: three times `comm_size` bytes, filled with -0.0f by whoever
// allocates it. -0.0f means that nothing has come: no sum of squares is one.
//
// It is used as a header and two slots, for even and for odd calls. A slot has a 64-bit word for
// each token and rank: the sum of squares of q, and in the upper half that of k.
constexpr uint64_t kEmptyWord = 0x8000000080000000u;
using WorkspaceHeader = stable_common::CallHeader<kMaxRanks, kEmptyWord>;
constexpr int64_t kHeaderBytes = 768;
static_assert(sizeof(WorkspaceHeader) <= kHeaderBytes);

// Whether the buffer has room for the header. Where it has none nothing may be written.
constexpr bool holds_header(int64_t comm_size) { return 3 * comm_size >= kHeaderBytes; }

constexpr int64_t slot_bytes_of(int64_t comm_size) {
  constexpr int64_t kLineBytes = 128;
  const int64_t bytes = (3 * comm_size - kHeaderBytes) / 2;
  return bytes > 0 ? bytes / kLineBytes * kLineBytes : 0;
}

constexpr int64_t bytes_per_token(int num_ranks) {
  return static_cast<int64_t>(sizeof(uint64_t)) * num_ranks;
}

// What a call may use of a slot. Never more than existing callers of the operators reckon with.
constexpr int64_t call_bytes_of(int64_t comm_size) {
  const int64_t slot_bytes = slot_bytes_of(comm_size);
  return slot_bytes < comm_size ? slot_bytes : comm_size;
}

// The tokens of the largest call.
constexpr int64_t capacity_of(int num_ranks, int64_t comm_size) {
  return call_bytes_of(comm_size) / bytes_per_token(num_ranks);
}

// Which place in a slot a token's words have. Tokens that follow each other are at work at the same
// time, and a line is slow for many that poll and write it. So in a large call each has another
// line, as far as there are lines, a power of two of them, in what a call may use; the tokens of
// one line are far apart, and at work one after the other. For few tokens it is more to have fewer
// lines to fetch.
class Places {
 public:
  Places() = default;
  __host__ __device__ Places(int num_ranks, int64_t comm_size, int64_t num_tokens) {
    constexpr int64_t kMostInOrder = 2048;
    if (num_tokens <= kMostInOrder) return;
    tokens_per_line_ = kLineBytes / static_cast<int>(bytes_per_token(num_ranks));
    const int64_t lines = call_bytes_of(comm_size) / kLineBytes;
    while (int64_t{2} << log2_lines_ <= lines) ++log2_lines_;
  }

  __host__ __device__ int64_t of(int64_t token) const {
    const int64_t round = token >> log2_lines_;
    if (round >= tokens_per_line_) return token;
    return (token - (round << log2_lines_)) * tokens_per_line_ + round;
  }

 private:
  static constexpr int kLineBytes = 128;

  int tokens_per_line_ = 0;  // 0: they lie in their order
  int log2_lines_ = 0;
};

// The least comm_size for calls of `max_tokens`, in whole lines.
constexpr int64_t comm_size_for(int num_ranks, int64_t max_tokens) {
  constexpr int64_t kLineBytes = 128;
  // From kHeaderBytes + kLineBytes on, a slot is no smaller than comm_size.
  const int64_t bytes = max_tokens * bytes_per_token(num_ranks);
  const int64_t least = kHeaderBytes + 2 * kLineBytes;
  return ((bytes < least ? least : bytes) + kLineBytes - 1) / kLineBytes * kLineBytes;
}

// What a call's descriptor says beside its number: its tokens, a hash of what else must be the same
// on all ranks, and whether there is a k.
constexpr int kDescriptorTokenBits = 24;
constexpr int kDescriptorHashBits = 12;
constexpr uint64_t kDescriptorHasK = uint64_t{1} << (kDescriptorTokenBits + kDescriptorHashBits);
static_assert(kDescriptorHasK < uint64_t{1} << stable_common::kDescriptorCallShift);

// The tokens of a call have fewer bits than this, also those of a single rank, which makes no
// descriptor.
constexpr int kTokenBits = 36;

// How a call is cut: on all ranks alike, lest blocks wait for some that find no room. Rows that a
// team is too small for go to the largest, one in each block.
struct RmsNormTuning {
  int warps_per_token = 1;      // 1, 2, 4 or 8
  int num_blocks = 1;           // each takes tokens in turn
  int threads_per_block = 128;  // a multiple of 32 * warps_per_token, at most max_threads_of()
};

// The most threads of a block with teams of so many warps. Large teams have one each, whose barrier
// is the block's.
constexpr int max_threads_of(int warps_per_token) {
  return warps_per_token == 1 ? 512 : warps_per_token <= 4 ? 128 : 256;
}

// How many such blocks find room on a multiprocessor at the least: threads with 128 registers each.
constexpr int kResidentThreads = 512;
constexpr int min_blocks_of(int warps_per_token) {
  return kResidentThreads / max_threads_of(warps_per_token);
}

// The most vectors of a row that a thread holds, in a team of so many warps; of more vectors only
// the largest team takes a row.
constexpr int max_vectors_of(int warps_per_token) { return warps_per_token <= 4 ? 7 : 4; }

// `row_vectors` is how many vectors q and k have together. If ranks share a GPU, all blocks of a
// call find room on `num_multiprocessors` at a time.
RmsNormTuning choose_tuning(int64_t row_vectors, int num_ranks, int64_t num_tokens,
                            int num_multiprocessors, bool shares_gpu);

struct RmsNormParams {
  using Header = WorkspaceHeader;

  // As existing callers build it: entries 2 * num_ranks ... 3 * num_ranks - 1 are the ranks'
  // communication buffers as this process maps them, entry 3 * num_ranks + 1 the address of
  // {0, comm_size}. Not read for a single rank.
  const int64_t* workspace = nullptr;
  stable_common::FailureRecord* failure_record = nullptr;  // as the device maps it
  uint64_t timeout_ns = 0;
  uint64_t descriptor = 0;  // make_descriptor(); not read for a single rank
  int rank = 0;
  int num_ranks = 1;

  const void* input = nullptr;     // rows of q_vectors + k_vectors or more
  int64_t input_stride_bytes = 0;  // between rows
  const void* weight_q = nullptr;  // q_vectors
  const void* weight_k = nullptr;  // k_vectors
  void* output_q = nullptr;        // dense rows of q_vectors
  void* output_k = nullptr;        // and of k_vectors
  int64_t num_tokens = 0;
  int q_vectors = 0;        // of kVectorBytes
  int k_vectors = 0;        // 0: there is no k
  float q_mean_factor = 0;  // 1 / (elements of q over all ranks)
  float k_mean_factor = 0;
  float eps = 0;

  // Reads device memory.
  __host__ __device__ Header* header(int r) const {
    return r < num_ranks ? reinterpret_cast<Header*>(workspace[2 * num_ranks + r]) : nullptr;
  }
};

// Of num_tokens, q_vectors, k_vectors and eps.
uint64_t make_descriptor(const RmsNormParams& params, ElementType type, bool has_k);

// Launches one call of at least one token. Never blocks. Returns what the launch returned.
cudaError_t launch_rms_norm(const RmsNormParams& params, ElementType type,
                            const RmsNormTuning& tuning,
                            const stable_common::DeviceProperties& device, cudaStream_t stream);

// Loads every kernel that launch_rms_norm() can launch for several ranks onto the current device,
// so that no launch has to.
cudaError_t load_rms_norm_kernels();

}  // namespace minimax_rms
