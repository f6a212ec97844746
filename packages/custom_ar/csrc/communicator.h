// One rank's all-reduce state on the host: whom it talks to, how long it waits, what has failed.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "all_reduce.h"
#include "shared_buffer.h"
#include "stable_common/device_properties.h"
#include "stable_common/peer_failure.h"
#include "stable_common/stream_order.h"

namespace custom_ar {

class Communicator {
 public:
  // `buffers` are the shared buffers of all ranks as this process maps them, `rank`'s own on
  // `device_index`, which must be current.
  Communicator(const char* op, std::vector<void*> buffers, int rank, int device_index);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const { return rank_; }
  int world_size() const { return static_cast<int>(buffers_.size()); }
  int device_index() const { return device_index_; }

  // Graphs that were captured before keep the timeout they were captured with.
  void set_timeout(double seconds) {
    timeout_ns_ = std::max(static_cast<uint64_t>(seconds * 1e9), uint64_t{1});
  }

  // How many blocks a call may have, the same on all ranks.
  void set_max_blocks(int max_blocks) { max_blocks_ = max_blocks; }
  AllReduceTuning choose_tuning(int64_t num_bytes) const {
    return limit_blocks(custom_ar::choose_tuning(world_size(), num_bytes), max_blocks_);
  }

  // Throws if a call has failed.
  void check_failure(const char* op) const { failure_.check_calls(op, timeout_ns_); }
  // The same, unless that has thrown before.
  void check_unraised(const char* op) const { failure_.check_unraised(op, timeout_ns_); }

  // The ranks that did not take part in the call that failed, if that is how it did.
  std::vector<int64_t> missing_ranks() const { return failure_.missing_ranks(); }

  // Reduces `num_elements` on `stream`, in as many pieces as the slots ask for. `output` may be
  // `input`.
  void all_reduce(const char* op, const void* input, void* output, int64_t num_elements,
                  ElementType type, const AllReduceTuning& tuning, cudaStream_t stream);

  // Waits for the device, then tells the peers that this rank will not write to them any more.
  void announce_close();

  // Closes mappings of peers' memory with the communicator.
  void add_mappings(const std::vector<void*>& addresses);
  // Closes none: that is for the caller, who then learns what fails.
  void keep_mappings();

 private:
  int rank_;
  int device_index_;
  int64_t slot_bytes_ = 0;
  int64_t resident_threads_ = 0;  // of the device, at the least
  bool is_ordered_ = false;       // among the large calls of the process
  int max_blocks_ = std::numeric_limits<int>::max();
  uint64_t timeout_ns_ = 0;  // 0: to be read from the environment
  std::vector<void*> buffers_;
  std::vector<void*> mappings_;
  stable_common::PeerFailure failure_;
  stable_common::DeviceProperties device_;

  std::mutex mutex_;  // guards what follows, and lets no thread's pieces between another's
  // On two streams at once calls would read each other's data.
  stable_common::StreamOrder streams_;
};

// The communicators of this process by id. Ids are not reused.
int64_t add_communicator(std::shared_ptr<Communicator> communicator);
std::shared_ptr<Communicator> find_communicator(const char* op, int64_t id);
void remove_communicator(const char* op, int64_t id);

}  // namespace custom_ar
