#include "communicator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>

#include "shared_memory.h"
#include "stable_common/cuda_check.h"
#include "stable_common/tensor_check.h"

namespace custom_ar {

namespace {

using stable_common::check;

constexpr double kDefaultTimeoutSeconds = 30.0;
constexpr double kMaxTimeoutSeconds = 1e9;

// CUSTOM_AR_TIMEOUT, in seconds.
double default_timeout(const char* op) {
  const char* text = std::getenv("CUSTOM_AR_TIMEOUT");
  if (text == nullptr || *text == '\0') return kDefaultTimeoutSeconds;
  char* end = nullptr;
  const double seconds = std::strtod(text, &end);
  while (*end == ' ') ++end;
  check(*end == '\0' && seconds > 0 && seconds < kMaxTimeoutSeconds, op,
        "CUSTOM_AR_TIMEOUT must be a positive number of seconds below 1e9, got ", text);
  return seconds;
}

FailureKind kind_of(uint64_t failure) { return static_cast<FailureKind>(failure & 0xff); }
uint32_t ranks_of(uint64_t failure) { return (failure >> kFailureRanksShift) & 0xff; }
uint32_t call_of(uint64_t failure) { return static_cast<uint32_t>(failure >> kFailureCallShift); }

std::vector<int64_t> list_ranks(uint32_t mask) {
  std::vector<int64_t> ranks;
  for (int r = 0; r < kMaxWorldSize; ++r) {
    if ((mask >> r & 1) != 0) ranks.push_back(r);
  }
  return ranks;
}

// "rank 1", or "ranks 1, 3".
std::string ranks_text(uint32_t mask) {
  const std::vector<int64_t> ranks = list_ranks(mask);
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(ranks[i]);
  }
  return text;
}

// "1024 elements of torch.bfloat16"
std::string descriptor_text(uint64_t descriptor) {
  constexpr const char* kTypes[] = {"torch.float32", "torch.float16", "torch.bfloat16", "?"};
  constexpr uint64_t kElements = (uint64_t{1} << kDescriptorElementBits) - 1;
  const bool is_two_shot = (descriptor >> kDescriptorAlgorithmShift & 3) != 0;
  return std::to_string(descriptor & kElements) + " elements of " +
         kTypes[descriptor >> kDescriptorTypeShift & 3] + (is_two_shot ? " in two shots" : "");
}

// Why another rank gave up: "since rank 1 did not take part".
std::string cause_text(uint64_t failure, int own_rank) {
  switch (kind_of(failure)) {
    case FailureKind::kTimeout:
      return (ranks_of(failure) >> own_rank & 1) != 0
                 ? "having waited in vain for this rank, " + std::to_string(own_rank)
                 : "since " + ranks_text(ranks_of(failure)) + " did not take part";
    case FailureKind::kDisagreement:
      return "since ranks disagreed on what to reduce";
    case FailureKind::kPeerClosed:
      return "since " + ranks_text(ranks_of(failure)) + " had closed";
    default:
      return "since two calls ran at once on a rank";
  }
}

}  // namespace

Communicator::Communicator(const char* op, std::vector<void*> buffers, int rank, int device_index)
    : rank_(rank), device_index_(device_index), buffers_(std::move(buffers)) {
  STABLE_CUDA_CHECK(stable_common::get_device_properties(device_index, &device_));
  check(device_.compute_capability >= 80, op,
        "needs a device of compute capability 8.0 or later, got ", device_.compute_capability / 10,
        ".", device_.compute_capability % 10);
  const int64_t own_bytes = shared_bytes(op, buffers_[rank]);
  slot_bytes_ = (own_bytes - kHeaderBytes) / kNumSlots / kVectorBytes * kVectorBytes;
  // A piece must hold a vector of each rank's.
  check(slot_bytes_ >= 2 * kMaxWorldSize * kVectorBytes, op, "ipc_tensors[", rank,
        "] must be a buffer of at least meta_size() bytes, got ", own_bytes);
  for (int r = 0; r < world_size(); ++r) {
    const int64_t bytes = shared_bytes(op, buffers_[r]);
    check(bytes >= kHeaderBytes + kNumSlots * slot_bytes_, op, "ipc_tensors[", r,
          "] must be a buffer as large as this rank's, ", own_bytes, " bytes, got ", bytes);
  }
  void* record = nullptr;
  STABLE_CUDA_CHECK(cudaHostAlloc(&record, sizeof(FailureRecord), cudaHostAllocMapped));
  std::memset(record, 0, sizeof(FailureRecord));
  record_ = static_cast<FailureRecord*>(record);
  void* device_record = nullptr;
  cudaError_t error = cudaHostGetDevicePointer(&device_record, record, 0);
  if (error == cudaSuccess) error = cudaEventCreateWithFlags(&last_call_, cudaEventDisableTiming);
  if (error != cudaSuccess) {
    (void)cudaFreeHost(record);
    STABLE_CUDA_CHECK(error);
  }
  device_record_ = static_cast<FailureRecord*>(device_record);
  add_mappings(buffers_);
}

Communicator::~Communicator() {
  // Kernels may still run: they end in bounded time. Nothing here can be reported.
  (void)cudaDeviceSynchronize();
  for (void* address : mappings_) {
    try {
      close_if_opened(address);
    } catch (...) {
    }
  }
  (void)cudaEventDestroy(last_call_);
  (void)cudaFreeHost(record_);
  (void)cudaGetLastError();
}

void Communicator::add_mappings(const std::vector<void*>& addresses) {
  const std::lock_guard lock(mutex_);
  for (int r = 0; r < world_size(); ++r) {
    if (r != rank_) mappings_.push_back(addresses[r]);
  }
}

void Communicator::check_failure(const char* op) const {
  const auto read = [](const uint64_t& word) {
    return __atomic_load_n(&word, __ATOMIC_ACQUIRE);  // written by the device
  };
  const uint64_t failure = read(record_->failure);
  if (failure == 0) return;
  const uint32_t call = call_of(failure);
  std::ostringstream text;
  switch (kind_of(failure)) {
    case FailureKind::kTimeout:
      text << ranks_text(ranks_of(failure)) << " did not take part in call " << call << " within "
           << static_cast<double>(timeout_ns_) * 1e-9 << " s (this is rank " << rank_ << " of "
           << world_size() << ")";
      break;
    case FailureKind::kDisagreement:
      text << "ranks disagree in call " << call << ": rank " << rank_ << " reduces "
           << descriptor_text(record_->own_descriptor) << ", " << ranks_text(ranks_of(failure))
           << " " << descriptor_text(record_->peer_descriptor);
      break;
    case FailureKind::kPeerClosed:
      text << ranks_text(ranks_of(failure)) << " had closed before call " << call
           << " (this is rank " << rank_ << " of " << world_size() << ")";
      break;
    case FailureKind::kConcurrentCall:
      text << "two calls ran at once on rank " << rank_ << " of " << world_size()
           << ": order the calls of a communicator, graph replays included, on one stream or by "
              "events";
      break;
    default: {
      const int peer = static_cast<int>(list_ranks(ranks_of(failure)).front());
      text << "rank " << peer << " gave up in call " << call_of(record_->peer_failure) << ", "
           << cause_text(record_->peer_failure, rank_) << " (this is rank " << rank_ << " of "
           << world_size() << ")";
    }
  }
  check(false, op, text.str(), "; this communicator can only be closed now");
}

std::vector<int64_t> Communicator::missing_ranks() const {
  const uint64_t failure = __atomic_load_n(&record_->failure, __ATOMIC_ACQUIRE);
  if (kind_of(failure) == FailureKind::kTimeout) return list_ranks(ranks_of(failure));
  if (kind_of(failure) == FailureKind::kPeerGaveUp &&
      kind_of(record_->peer_failure) == FailureKind::kTimeout) {
    return list_ranks(ranks_of(record_->peer_failure));
  }
  return {};
}

bool Communicator::order_after_other_streams(cudaStream_t stream) {
  if (has_called_ && stream == last_stream_ && !has_several_streams_) return false;
  const auto captures = [](cudaStream_t queried) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    STABLE_CUDA_CHECK(cudaStreamIsCapturing(queried, &status));
    return status != cudaStreamCaptureStatusNone;
  };
  // What is captured runs when its graph does, and is ordered where that is launched.
  if (captures(stream)) return true;
  if (!has_called_ || stream == last_stream_) return false;
  if (!has_several_streams_) {
    // A stream that has begun to capture can be neither asked nor waited for.
    if (captures(last_stream_)) return false;
    const cudaError_t busy = cudaStreamQuery(last_stream_);
    if (busy == cudaSuccess) return false;
    if (busy != cudaErrorNotReady) STABLE_CUDA_CHECK(busy);
    (void)cudaGetLastError();
    has_several_streams_ = true;
    STABLE_CUDA_CHECK(cudaEventRecord(last_call_, last_stream_));
  }
  STABLE_CUDA_CHECK(cudaStreamWaitEvent(stream, last_call_));
  return false;
}

void Communicator::all_reduce(const char* op, const void* input, void* output, int64_t num_elements,
                              ElementType type, const AllReduceTuning& tuning,
                              cudaStream_t stream) {
  check_failure(op);
  const std::lock_guard lock(mutex_);
  if (timeout_ns_ == 0) set_timeout(default_timeout(op));
  const bool is_capturing = order_after_other_streams(stream);

  AllReduceParams params;
  for (int r = 0; r < world_size(); ++r) {
    params.buffers[r] = static_cast<SharedHeader*>(buffers_[r]);
  }
  params.failure_record = device_record_;
  params.slot_bytes = slot_bytes_;
  params.timeout_ns = timeout_ns_;
  params.rank = rank_;
  params.descriptor = make_descriptor(type, tuning.algorithm, num_elements);
  params.is_aligned =
      (reinterpret_cast<uintptr_t>(input) | reinterpret_cast<uintptr_t>(output)) % kVectorBytes ==
      0;
  params.depth = tuning.depth;

  const int64_t num_bytes = num_elements * element_bytes(type);
  const int64_t piece_bytes = bytes_per_piece(tuning.algorithm, world_size(), slot_bytes_);
  for (int64_t offset = 0; offset < num_bytes; offset += piece_bytes) {
    params.input = static_cast<const char*>(input) + offset;
    params.output = static_cast<char*>(output) + offset;
    params.num_bytes = std::min(piece_bytes, num_bytes - offset);
    STABLE_CUDA_CHECK(launch_all_reduce(params, type, world_size(), tuning, device_, stream));
  }

  if (is_capturing) return;
  if (has_several_streams_) STABLE_CUDA_CHECK(cudaEventRecord(last_call_, stream));
  last_stream_ = stream;
  has_called_ = true;
}

void Communicator::announce_close() {
  STABLE_CUDA_CHECK(cudaDeviceSynchronize());
  const uint32_t closed = 1;
  for (int r = 0; r < world_size(); ++r) {
    if (r == rank_) continue;
    auto* header = static_cast<SharedHeader*>(buffers_[r]);
    STABLE_CUDA_CHECK(
        cudaMemcpy(&header->closed[rank_], &closed, sizeof(closed), cudaMemcpyDefault));
  }
}

std::vector<int64_t> Communicator::open_peers() const {
  uint32_t closed[kMaxWorldSize] = {};
  const auto* header = static_cast<const SharedHeader*>(buffers_[rank_]);
  STABLE_CUDA_CHECK(cudaMemcpy(closed, header->closed, sizeof(closed), cudaMemcpyDefault));
  std::vector<int64_t> open;
  for (int r = 0; r < world_size(); ++r) {
    if (r != rank_ && closed[r] == 0) open.push_back(r);
  }
  return open;
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
