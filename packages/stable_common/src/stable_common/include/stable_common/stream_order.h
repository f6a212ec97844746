// Orders calls across streams in the order they are made.
#pragma once

#include <cuda_runtime_api.h>

#include "stable_common/capture.h"
#include "stable_common/cuda_check.h"

namespace stable_common {

// For calls that on two streams at once would read each other's data. Events are recorded once a
// second stream has been seen while the first was at work. Not thread-safe. A stream with a call
// must not be destroyed before one of another stream: torch's own streams never are.
class StreamOrder {
 public:
  StreamOrder() = default;
  ~StreamOrder() {
    if (last_call_ != nullptr) (void)cudaEventDestroy(last_call_);
    (void)cudaGetLastError();
  }
  StreamOrder(const StreamOrder&) = delete;
  StreamOrder& operator=(const StreamOrder&) = delete;

  // Lets what follows on `stream` wait for the last call, and returns whether `stream` captures.
  bool begin_call(cudaStream_t stream) {
    if (has_called_ && stream == last_stream_ && !has_several_streams_) return false;
    // What is captured runs when its graph does, and is ordered where that is launched.
    if (is_capturing(stream)) return true;
    if (!has_called_ || stream == last_stream_) return false;
    if (!has_several_streams_) {
      // A stream that has begun to capture can be neither asked nor waited for.
      if (is_capturing(last_stream_)) return false;
      // Another stream may capture, and its capture must not end for what is asked here.
      const RelaxedCapture relaxed;
      const cudaError_t busy = cudaStreamQuery(last_stream_);
      if (busy == cudaSuccess) return false;
      if (busy != cudaErrorNotReady) STABLE_CUDA_CHECK(busy);
      (void)cudaGetLastError();
      if (last_call_ == nullptr) {
        STABLE_CUDA_CHECK(cudaEventCreateWithFlags(&last_call_, cudaEventDisableTiming));
      }
      has_several_streams_ = true;
      STABLE_CUDA_CHECK(cudaEventRecord(last_call_, last_stream_));
    }
    STABLE_CUDA_CHECK(cudaStreamWaitEvent(stream, last_call_));
    return false;
  }

  // After the call's launch, unless begin_call() said that `stream` captures.
  void end_call(cudaStream_t stream) {
    if (has_several_streams_) STABLE_CUDA_CHECK(cudaEventRecord(last_call_, stream));
    last_stream_ = stream;
    has_called_ = true;
  }

  // All calls have ended: no stream is waited for, or needs to be there, any more.
  void forget() {
    has_called_ = false;
    has_several_streams_ = false;
  }

 private:
  cudaEvent_t last_call_ = nullptr;
  cudaStream_t last_stream_ = nullptr;
  bool has_called_ = false;
  bool has_several_streams_ = false;
};

}  // namespace stable_common
