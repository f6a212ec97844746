// What must be known of streams that capture a graph.
#pragma once

#include <cuda_runtime_api.h>

#include "stable_common/cuda_check.h"

namespace stable_common {

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STABLE_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// As long as this lives, the thread may call what would else invalidate a capture, such as to
// allocate: for what is no work on a stream that captures.
class RelaxedCapture {
 public:
  RelaxedCapture() { STABLE_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the one to go back to
};

}  // namespace stable_common
