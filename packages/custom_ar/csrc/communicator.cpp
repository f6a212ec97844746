#include "communicator.h"

#include <algorithm>
#include <cstdlib>
#include <string>
#include <unordered_map>
#include <utility>

#include "stable_common/capture.h"
#include "stable_common/cuda_check.h"
#include "stable_common/large_calls.h"
#include "stable_common/peer_memory.h"
#include "stable_common/tensor_check.h"

namespace custom_ar {

namespace {

using stable_common::check;

// "1024 elements of torch.bfloat16"
std::string descriptor_text(uint64_t descriptor) {
  constexpr const char* kTypes[] = {"torch.float32", "torch.float16", "torch.bfloat16", "?"};
  constexpr uint64_t kElements = (uint64_t{1} << kDescriptorElementBits) - 1;
  const bool is_two_shot = (descriptor >> kDescriptorAlgorithmShift & 3) != 0;
  return std::to_string(descriptor & kElements) + " elements of " +
         kTypes[descriptor >> kDescriptorTypeShift & 3] + (is_two_shot ? " in two shots" : "");
}

constexpr stable_common::PeerFailure::Wording kWording = {
    .object = "communicator",
    .verb = "reduces",
    .describe = descriptor_text,
    .describe_capacity = nullptr,  // larger messages pass in pieces
};

}  // namespace

Communicator::Communicator(const char* op, std::vector<void*> buffers, int rank, int device_index)
    : rank_(rank),
      device_index_(device_index),
      buffers_(std::move(buffers)),
      failure_(kWording, rank, static_cast<int>(buffers_.size())) {
  STABLE_CUDA_CHECK(stable_common::get_device_properties(device_index, &device_));
  check(device_.compute_capability >= 80, op,
        "needs a device of compute capability 8.0 or later, got ", device_.compute_capability / 10,
        ".", device_.compute_capability % 10);
  {
    const stable_common::RelaxedCapture relaxed;
    int registers = 0;
    STABLE_CUDA_CHECK(load_all_reduce_kernels(world_size(), &registers));
    // Of a multiprocessor, which gives them to threads by eights.
    constexpr int kRegisters = 1 << 16;
    resident_threads_ =
        int64_t{device_.num_multiprocessors} * (kRegisters / ((registers + 7) / 8 * 8));
  }
  // The smallest buffer decides, so that all ranks have slots of one size: each sees the same
  // sizes.
  int64_t buffer_bytes = INT64_MAX;
  for (int r = 0; r < world_size(); ++r) {
    const int64_t bytes = stable_common::shared_bytes(op, buffers_[r]);
    // A piece must hold a vector of each rank's.
    constexpr int64_t kMinSlotBytes = 2 * kMaxWorldSize * kVectorBytes;
    check(bytes >= kHeaderBytes + kNumSlots * kMinSlotBytes, op, "ipc_tensors[", r,
          "] must be a buffer of at least meta_size() bytes, got ", bytes);
    buffer_bytes = std::min(buffer_bytes, bytes);
  }
  slot_bytes_ = (buffer_bytes - kHeaderBytes) / kNumSlots / kVectorBytes * kVectorBytes;
  // Ranks of one process are for the caller to order: they wait for each other.
  is_ordered_ = std::any_of(buffers_.begin(), buffers_.end(), [](const void* buffer) {
    return stable_common::allocated_bytes(buffer) == 0;
  });
  if (is_ordered_) stable_common::LargeCalls::instance().add_object(device_index_);
  add_mappings(buffers_);
}

Communicator::~Communicator() {
  // Kernels may still run: they end in bounded time. Nothing here can be reported.
  (void)cudaDeviceSynchronize();
  if (is_ordered_) stable_common::LargeCalls::instance().remove_object(device_index_);
  for (void* address : mappings_) {
    try {
      stable_common::close_if_opened(address);
    } catch (...) {
    }
  }
  (void)cudaGetLastError();
}

void Communicator::add_mappings(const std::vector<void*>& addresses) {
  const std::lock_guard lock(mutex_);
  for (int r = 0; r < world_size(); ++r) {
    if (r != rank_) mappings_.push_back(addresses[r]);
  }
}

void Communicator::keep_mappings() {
  const std::lock_guard lock(mutex_);
  mappings_.clear();
}

void Communicator::all_reduce(const char* op, const void* input, void* output, int64_t num_elements,
                              ElementType type, const AllReduceTuning& tuning,
                              cudaStream_t stream) {
  check_failure(op);
  const std::lock_guard lock(mutex_);
  if (timeout_ns_ == 0) set_timeout(stable_common::default_timeout(op, "CUSTOM_AR_TIMEOUT"));
  const bool is_capturing = streams_.begin_call(stream);

  AllReduceParams params;
  for (int r = 0; r < world_size(); ++r) {
    params.buffers[r] = static_cast<SharedHeader*>(buffers_[r]);
  }
  params.failure_record = failure_.device_record();
  params.slot_bytes = slot_bytes_;
  params.timeout_ns = timeout_ns_;
  params.rank = rank_;
  params.descriptor = make_descriptor(type, tuning.algorithm, num_elements);
  params.is_aligned =
      (reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(output)) % kVectorBytes ==
      0;
  params.depth = tuning.depth;

  const int64_t num_bytes = num_elements * stable_common::element_bytes(type);
  const int64_t piece_bytes = bytes_per_piece(tuning.algorithm, world_size(), slot_bytes_);
  const auto launch = [&] {
    for (int64_t offset = 0; offset < num_bytes; offset += piece_bytes) {
      params.input = static_cast<const char*>(input) + offset;
      params.output = static_cast<char*>(output) + offset;
      params.num_bytes = std::min(piece_bytes, num_bytes - offset);
      STABLE_CUDA_CHECK(launch_all_reduce(params, type, world_size(), tuning, device_, stream));
    }
  };
  if (is_ordered_) {
    const int64_t num_threads =
        int64_t{tuning.num_blocks} * (tuning.threads_per_block + kControlThreads);
    stable_common::LargeCalls::instance().run(device_index_, stream, num_threads, resident_threads_,
                                              launch);
  } else {
    launch();
  }

  if (!is_capturing) streams_.end_call(stream);
}

void Communicator::announce_close() {
  STABLE_CUDA_CHECK(cudaDeviceSynchronize());
  const uint64_t closed = 1;
  for (int r = 0; r < world_size(); ++r) {
    if (r == rank_) continue;
    auto* header = static_cast<SharedHeader*>(buffers_[r]);
    STABLE_CUDA_CHECK(
        cudaMemcpy(&header->closed[rank_], &closed, sizeof(closed), cudaMemcpyDefault));
  }
}

namespace {

struct Communicators {
  std::mutex mutex;
  std::unordered_map<int64_t, std::shared_ptr<Communicator>> by_id;
  int64_t next_id = 1;
};

Communicators& communicators() {
  static Communicators* const instance = new Communicators;  // outlives every static destructor
  return *instance;
}

[[noreturn]] void throw_unknown(const char* op, int64_t id) {
  check(false, op, "fa must be what init_custom_ar returned and not be disposed of, got ", id);
  std::abort();
}

}  // namespace

int64_t add_communicator(std::shared_ptr<Communicator> communicator) {
  const std::lock_guard lock(communicators().mutex);
  const int64_t id = communicators().next_id++;
  communicators().by_id[id] = std::move(communicator);
  return id;
}

std::shared_ptr<Communicator> find_communicator(const char* op, int64_t id) {
  const std::lock_guard lock(communicators().mutex);
  const auto found = communicators().by_id.find(id);
  if (found == communicators().by_id.end()) throw_unknown(op, id);
  return found->second;
}

void remove_communicator(const char* op, int64_t id) {
  std::shared_ptr<Communicator> removed;  // destroyed after the lock is released
  const std::lock_guard lock(communicators().mutex);
  const auto found = communicators().by_id.find(id);
  if (found == communicators().by_id.end()) throw_unknown(op, id);
  removed = std::move(found->second);
  communicators().by_id.erase(found);
}

}  // namespace custom_ar
