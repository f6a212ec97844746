// What the host knows of a workspace: how long its calls wait, what has failed, its streams.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "rms_norm.h"
#include "stable_common/device_properties.h"
#include "stable_common/peer_failure.h"
#include "stable_common/stream_order.h"

namespace minimax_rms {

class Workspace {
 public:
  // On the current device, `device_index`. `address` is the workspace tensor's.
  Workspace(const char* op, const int64_t* address, int rank, int num_ranks, int device_index);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Of the device, unless set_limits() said otherwise.
  int num_multiprocessors() const { return num_multiprocessors_; }
  bool shares_gpu() const { return shares_gpu_; }

  bool is_of(int rank, int num_ranks, int device_index) const {
    return rank_ == rank && num_ranks_ == num_ranks && device_index_ == device_index;
  }

  // Graphs that were captured before keep the timeout they were captured with.
  void set_timeout(double seconds) {
    timeout_ns_ = std::max(static_cast<uint64_t>(seconds * 1e9), uint64_t{1});
  }
  // What is known of a workspace that is registered: the tokens of its largest call, and, the same
  // on all ranks, how many multiprocessors calls are cut for and whether any ranks share a GPU.
  void set_limits(int64_t max_tokens, int num_multiprocessors, bool shares_gpu) {
    max_tokens_ = max_tokens;
    num_multiprocessors_ = num_multiprocessors;
    shares_gpu_ = shares_gpu;
  }
  // From now on large calls are ordered among those of the process. Not for ranks of one process,
  // which wait for each other.
  void order_large_calls();
  bool is_registered() const { return max_tokens_ >= 0; }

  bool has_failed() const { return failure_.has_failed(); }
  void check_calls(const char* op) const { failure_.check_calls(op, timeout_ns_); }
  // The same, unless that has thrown before.
  void check_unraised(const char* op) const { failure_.check_unraised(op, timeout_ns_); }
  std::vector<int64_t> missing_ranks() const { return failure_.missing_ranks(); }
  void check_capacity(const char* op, int64_t num_tokens) const;

  // Whether the device knows of no failure: the memory is another workspace's by now. Legal while a
  // stream captures.
  bool is_fresh() const;

  // Launches a call on `stream`; `params` lacks what is the workspace's.
  void launch(const char* op, RmsNormParams params, ElementType type, const RmsNormTuning& tuning,
              cudaStream_t stream);

 private:
  const int64_t* address_;
  int rank_;
  int num_ranks_;
  int device_index_;
  uint64_t timeout_ns_ = 0;  // 0: to be read from the environment
  int64_t max_tokens_ = -1;  // not known
  int num_multiprocessors_ = 0;
  bool shares_gpu_ = false;
  bool is_ordered_ = false;
  stable_common::DeviceProperties device_;
  stable_common::PeerFailure failure_;
  std::mutex mutex_;  // guards what follows
  stable_common::StreamOrder streams_;
};

// Workspaces by the address of their tensor. One that is not known yet is added, and stays until it
// is forgotten or another is found in its place: nobody says when a caller's workspace is gone.
std::shared_ptr<Workspace> find_or_add_workspace(const char* op, const int64_t* address, int rank,
                                                 int num_ranks, int device_index);
// Null if it is not known.
std::shared_ptr<Workspace> find_workspace(const int64_t* address);
void forget_workspace(const int64_t* address);

}  // namespace minimax_rms
