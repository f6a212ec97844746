// What the host says of a failed call of several ranks.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <vector>

#include "stable_common/capture.h"
#include "stable_common/cuda_check.h"
#include "stable_common/peer_call.h"
#include "stable_common/tensor_check.h"

namespace stable_common {

constexpr double kMaxTimeoutSeconds = 1e9;

// The environment variable `name`, in seconds, or 30.
inline double default_timeout(const char* op, const char* name) {
  constexpr double kDefaultTimeoutSeconds = 30.0;
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return kDefaultTimeoutSeconds;
  char* end = nullptr;
  const double seconds = std::strtod(text, &end);
  while (*end == ' ') ++end;
  check(*end == '\0' && seconds > 0 && seconds < kMaxTimeoutSeconds, op, name,
        " must be a positive number of seconds below 1e9, got ", text);
  return seconds;
}

inline void check_timeout(const char* op, double seconds) {
  check(seconds > 0 && seconds < kMaxTimeoutSeconds, op, "seconds must be in (0, 1e9), got ",
        seconds);
}

inline std::vector<int64_t> list_ranks(uint32_t mask) {
  std::vector<int64_t> ranks;
  for (int r = 0; r < kFailureRanksBits; ++r) {
    if ((mask >> r & 1) != 0) ranks.push_back(r);
  }
  return ranks;
}

// "rank 1", or "ranks 1, 3".
inline std::string ranks_text(uint32_t mask) {
  const std::vector<int64_t> ranks = list_ranks(mask);
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(ranks[i]);
  }
  return text;
}

// A rank's FailureRecord, in host memory that the device can write.
class PeerFailure {
 public:
  // How failures are told of a kernel.
  struct Wording {
    const char* object;                            // "communicator": what the calls belong to
    const char* verb;                              // "reduces": what a rank does in a call
    std::string (*describe)(uint64_t descriptor);  // "5 elements": what it does that to
    std::string (*describe_capacity)(uint64_t capacity);
    const char* hashed = nullptr;  // "dtype": what differs in descriptors that read the same
  };

  // On the current device.
  PeerFailure(const Wording& wording, int rank, int world_size)
      : wording_(wording), rank_(rank), world_size_(world_size) {
    const RelaxedCapture relaxed;
    void* record = nullptr;
    void* device_record = nullptr;
    cudaError_t error =
        cudaHostAlloc(&record, sizeof(FailureRecord), cudaHostAllocMapped | cudaHostAllocPortable);
    if (error == cudaSuccess) {
      std::memset(record, 0, sizeof(FailureRecord));
      error = cudaHostGetDevicePointer(&device_record, record, 0);
      if (error != cudaSuccess) (void)cudaFreeHost(record);
    }
    STABLE_CUDA_CHECK(error);
    record_ = static_cast<FailureRecord*>(record);
    device_record_ = static_cast<FailureRecord*>(device_record);
  }
  // No kernel that writes the record may run any more.
  ~PeerFailure() {
    (void)cudaFreeHost(record_);
    (void)cudaGetLastError();
  }
  PeerFailure(const PeerFailure&) = delete;
  PeerFailure& operator=(const PeerFailure&) = delete;

  FailureRecord* device_record() const { return device_record_; }

  bool has_failed() const { return failure() != 0; }

  // Throws if a call has failed. `timeout_ns` is what calls waited for.
  void check_calls(const char* op, uint64_t timeout_ns) const {
    if (has_failed()) throw_failure(op, timeout_ns);
  }

  // The same, unless check_calls() has thrown for it.
  void check_unraised(const char* op, uint64_t timeout_ns) const {
    if (!is_raised_) check_calls(op, timeout_ns);
  }

  // The ranks that did not take part in the call that failed, if that is how it did.
  std::vector<int64_t> missing_ranks() const {
    uint64_t cause = failure();
    if (failure_kind(cause) == FailureKind::kPeerGaveUp) cause = record_->detail;
    if (failure_kind(cause) != FailureKind::kTimeout) return {};
    return list_ranks(failed_ranks(cause));
  }

 private:
  // Written by the device.
  uint64_t failure() const { return __atomic_load_n(&record_->failure, __ATOMIC_ACQUIRE); }

  [[noreturn]] void throw_failure(const char* op, uint64_t timeout_ns) const {
    is_raised_ = true;
    const uint64_t failure = this->failure();
    const uint32_t call = failed_call(failure);
    const std::string ranks = ranks_text(failed_ranks(failure));
    std::ostringstream who;
    who << " (this is rank " << rank_ << " of " << world_size_ << ")";
    std::ostringstream text;
    switch (failure_kind(failure)) {
      case FailureKind::kTimeout:
        text << ranks << " did not take part in call " << call << " within "
             << static_cast<double>(timeout_ns) * 1e-9 << " s" << who.str();
        break;
      case FailureKind::kDisagreement:
        text << "ranks disagree in call " << call << ": rank " << rank_ << " " << wording_.verb
             << " " << wording_.describe(record_->descriptor) << ", " << ranks << " "
             << wording_.describe(record_->detail);
        if (wording_.hashed != nullptr &&
            wording_.describe(record_->descriptor) == wording_.describe(record_->detail)) {
          text << " of other " << wording_.hashed;
        }
        break;
      case FailureKind::kPeerClosed:
        text << ranks << " had closed before call " << call << who.str();
        break;
      case FailureKind::kConcurrentCall:
        text << "two calls ran at once on rank " << rank_ << " of " << world_size_
             << ": order the calls of a " << wording_.object
             << ", graph replays included, on one stream or by events";
        break;
      case FailureKind::kOverCapacity:
        text << "call " << call << " of " << wording_.describe(record_->descriptor)
             << " exceeds the capacity of the " << wording_.object << ", "
             << wording_.describe_capacity(record_->detail) << who.str();
        break;
      default:
        text << ranks << " gave up in call " << failed_call(record_->detail) << ", "
             << cause_text(record_->detail) << who.str();
    }
    text << "; this " << wording_.object << " can only be closed now";
    check(false, op, text.str());
    std::abort();
  }

  // Why another rank gave up: "since rank 1 did not take part".
  std::string cause_text(uint64_t failure) const {
    const uint32_t ranks = failed_ranks(failure);
    switch (failure_kind(failure)) {
      case FailureKind::kTimeout:
        return (ranks >> rank_ & 1) != 0
                   ? "having waited in vain for this rank, " + std::to_string(rank_)
                   : "since " + ranks_text(ranks) + " did not take part";
      case FailureKind::kDisagreement:
        return "since ranks disagreed on the call";
      case FailureKind::kPeerClosed:
        return "since " + ranks_text(ranks) + " had closed";
      case FailureKind::kOverCapacity:
        return "since the call exceeds its capacity";
      default:
        return "since two calls ran at once on a rank";
    }
  }

  Wording wording_;
  int rank_;
  int world_size_;
  mutable std::atomic<bool> is_raised_ = false;
  FailureRecord* record_ = nullptr;         // host memory
  FailureRecord* device_record_ = nullptr;  // the same, as the device maps it
};

}  // namespace stable_common
