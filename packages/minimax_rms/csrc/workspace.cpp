#include "workspace.h"

#include <algorithm>
#include <string>
#include <unordered_map>
#include <utility>

#include "stable_common/capture.h"
#include "stable_common/cuda_check.h"
#include "stable_common/large_calls.h"
#include "stable_common/peer_memory.h"
#include "stable_common/stream.h"
#include "stable_common/tensor_check.h"

namespace minimax_rms {

namespace {

using stable_common::check;

std::string tokens_text(uint64_t tokens) {
  return std::to_string(tokens) + (tokens == 1 ? " token" : " tokens");
}

// "5 tokens of q and k"
std::string descriptor_text(uint64_t descriptor) {
  return tokens_text(descriptor & ((uint64_t{1} << kDescriptorTokenBits) - 1)) +
         ((descriptor & kDescriptorHasK) != 0 ? " of q and k" : "");
}

constexpr stable_common::PeerFailure::Wording kWording = {
    .object = "workspace",
    .verb = "normalizes",
    .describe = descriptor_text,
    .describe_capacity = tokens_text,
    .hashed = "row sizes, dtype or eps",
};

}  // namespace

Workspace::Workspace(const char* op, const int64_t* address, int rank, int num_ranks,
                     int device_index)
    : address_(address),
      rank_(rank),
      num_ranks_(num_ranks),
      device_index_(device_index),
      failure_(kWording, rank, num_ranks) {
  STABLE_CUDA_CHECK(stable_common::get_device_properties(device_index, &device_));
  check(device_.compute_capability >= 80, op,
        "needs a device of compute capability 8.0 or later, got ", device_.compute_capability / 10,
        ".", device_.compute_capability % 10);
  num_multiprocessors_ = device_.num_multiprocessors;
  if (num_ranks > 1) {
    const stable_common::RelaxedCapture relaxed;
    STABLE_CUDA_CHECK(load_rms_norm_kernels());
  }
}

Workspace::~Workspace() {
  // Kernels may still run: they end in bounded time. Nothing here can be reported.
  try {
    const stable_common::CurrentDevice current(device_index_);
    (void)cudaDeviceSynchronize();
    if (is_ordered_) stable_common::LargeCalls::instance().remove_object(device_index_);
  } catch (...) {
  }
  (void)cudaGetLastError();
}

void Workspace::order_large_calls() {
  if (is_ordered_) return;
  std::vector<void*> buffers(num_ranks_);
  STABLE_CUDA_CHECK(cudaMemcpy(buffers.data(), &address_[2 * num_ranks_],
                               buffers.size() * sizeof(void*), cudaMemcpyDeviceToHost));
  is_ordered_ = std::any_of(buffers.begin(), buffers.end(), [](const void* buffer) {
    return stable_common::allocated_bytes(buffer) == 0;
  });
  if (is_ordered_) stable_common::LargeCalls::instance().add_object(device_index_);
}

void Workspace::check_capacity(const char* op, int64_t num_tokens) const {
  check(!is_registered() || num_tokens <= max_tokens_, op,
        "a call may have at most max_tokens = ", max_tokens_, " tokens in this workspace, got ",
        num_tokens);
}

bool Workspace::is_fresh() const {
  const stable_common::RelaxedCapture relaxed;
  const auto read = [](const void* source, auto* value) {
    return cudaMemcpy(value, source, sizeof(*value), cudaMemcpyDeviceToHost) == cudaSuccess;
  };
  const int64_t* layout = nullptr;
  int64_t comm_size = 0;
  const WorkspaceHeader* header = nullptr;
  uint64_t failure = 0;
  const bool is_read = read(&address_[3 * num_ranks_ + 1], &layout) &&
                       read(&layout[1], &comm_size) && holds_header(comm_size) &&
                       read(&address_[2 * num_ranks_ + rank_], &header) &&
                       read(&header->failure, &failure);
  (void)cudaGetLastError();
  return is_read && WorkspaceHeader::from_stored(failure) == 0;
}

void Workspace::launch(const char* op, RmsNormParams params, ElementType type,
                       const RmsNormTuning& tuning, cudaStream_t stream) {
  check_calls(op);
  const std::lock_guard lock(mutex_);
  if (timeout_ns_ == 0) set_timeout(stable_common::default_timeout(op, "MINIMAX_RMS_TIMEOUT"));
  const bool is_capturing = streams_.begin_call(stream);
  params.workspace = address_;
  params.failure_record = failure_.device_record();
  params.timeout_ns = timeout_ns_;
  params.rank = rank_;
  params.num_ranks = num_ranks_;
  const auto launch = [&] {
    STABLE_CUDA_CHECK(launch_rms_norm(params, type, tuning, device_, stream));
  };
  if (is_ordered_) {
    const int64_t num_threads = int64_t{tuning.num_blocks} * tuning.threads_per_block;
    stable_common::LargeCalls::instance().run(
        device_index_, stream, num_threads, int64_t{kResidentThreads} * device_.num_multiprocessors,
        launch);
  } else {
    launch();
  }
  if (!is_capturing) streams_.end_call(stream);
}

namespace {

struct Workspaces {
  std::mutex mutex;
  std::unordered_map<const int64_t*, std::shared_ptr<Workspace>> by_address;
  // Replaced in the middle of a call, when nothing may be waited for.
  std::vector<std::shared_ptr<Workspace>> stale;

  static Workspaces& instance() {
    static Workspaces* const workspaces = new Workspaces;  // outlives every static destructor
    return *workspaces;
  }
};

}  // namespace

std::shared_ptr<Workspace> find_or_add_workspace(const char* op, const int64_t* address, int rank,
                                                 int num_ranks, int device_index) {
  Workspaces& workspaces = Workspaces::instance();
  const std::lock_guard lock(workspaces.mutex);
  std::shared_ptr<Workspace>& entry = workspaces.by_address[address];
  if (entry != nullptr) {
    // A caller's workspace goes without a word, and its memory may serve another.
    const bool is_same = entry->is_of(rank, num_ranks, device_index) &&
                         (entry->is_registered() || !entry->has_failed() || !entry->is_fresh());
    if (is_same) return entry;
    check(!entry->is_registered(), op, "rank and nranks must be those of the workspace, got rank ",
          rank, " of ", num_ranks);
    workspaces.stale.push_back(std::move(entry));
    entry = nullptr;
  }
  try {
    entry = std::make_shared<Workspace>(op, address, rank, num_ranks, device_index);
  } catch (...) {
    workspaces.by_address.erase(address);
    throw;
  }
  return entry;
}

std::shared_ptr<Workspace> find_workspace(const int64_t* address) {
  Workspaces& workspaces = Workspaces::instance();
  const std::lock_guard lock(workspaces.mutex);
  const auto found = workspaces.by_address.find(address);
  return found == workspaces.by_address.end() ? nullptr : found->second;
}

void forget_workspace(const int64_t* address) {
  std::vector<std::shared_ptr<Workspace>> forgotten;  // destroyed after the lock is released
  Workspaces& workspaces = Workspaces::instance();
  const std::lock_guard lock(workspaces.mutex);
  forgotten.swap(workspaces.stale);
  const auto found = workspaces.by_address.find(address);
  if (found == workspaces.by_address.end()) return;
  forgotten.push_back(std::move(found->second));
  workspaces.by_address.erase(found);
}

}  // namespace minimax_rms
