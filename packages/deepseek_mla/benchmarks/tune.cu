// Times every tuning of the fused insert and prints JSON: the figures behind choose_tuning().
//
// `./nox -s bundle` builds it as dist/bundle/packages/deepseek_mla/benchmarks/tune. A case is timed
// over CUDA graphs of 20 calls that rotate through more data than the L2 holds. All tunings must
// write the same bits; what those are is for the tests to say.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "fused_insert.h"

namespace {

using namespace deepseek_mla;

#define CUDA_OK(call)                                                   \
  do {                                                                  \
    const cudaError_t error = (call);                                   \
    if (error != cudaSuccess) {                                         \
      std::fprintf(stderr, "%s:%d %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(error));                          \
      std::exit(1);                                                     \
    }                                                                   \
  } while (0)

constexpr int kCallsPerGraph = 20;
constexpr int kRepetitions = 15;
constexpr int64_t kRotationBytes = 192 << 20;  // more than twice an H200's L2
constexpr int kMaxPosition = 65536;
constexpr int kBlockSize = 64;

__global__ void fill_bf16(uint16_t* data, int64_t n, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    // A random sign and mantissa, exponents from 2^-4 to 2^3.
    data[i] = static_cast<uint16_t>((x & 0x807f) | ((123 + ((x >> 8) & 7)) << 7));
  }
}

// Adds a position-dependent hash of `n` words to `*sum`.
__global__ void hash_words(const uint32_t* words, int64_t n, unsigned long long* sum) {
  unsigned long long hash = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    unsigned long long x = words[i] * 0x9e3779b97f4a7c15ull + i;
    x ^= x >> 29;
    hash += x * 0xbf58476d1ce4e5b9ull;
  }
  atomicAdd(sum, hash);
}

template <typename T>
T* device_array(int64_t n) {
  void* p = nullptr;
  CUDA_OK(cudaMalloc(&p, n * sizeof(T)));
  return static_cast<T*>(p);
}

template <typename T>
T* upload(const std::vector<T>& host) {
  T* p = device_array<T>(host.size());
  CUDA_OK(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

struct Case {
  int num_tokens;
  int num_heads;
  int num_heads_padded;

  int64_t bytes() const {
    return int64_t{num_tokens} * (1024 * (num_heads + num_heads_padded) + 1024 + 584 + 272);
  }
};

std::vector<FusedInsertTuning> tunings() {
  std::vector<FusedInsertTuning> all;
  for (int lanes : {8, 16, 32}) {
    for (int warps : {1, 2, 4, 8}) {
      for (bool prefetch : {false, true}) all.push_back({lanes, warps, prefetch});
    }
  }
  return all;
}

// All inputs and outputs of the calls that one measurement rotates through.
class Workload {
 public:
  Workload(const Case& c, const float* cos_sin) {
    std::mt19937_64 random(c.num_tokens * 1000 + c.num_heads);
    const int64_t calls = std::max<int64_t>(1, kRotationBytes / c.bytes());
    num_calls_ = static_cast<int>((calls + kCallsPerGraph - 1) / kCallsPerGraph * kCallsPerGraph);
    const int64_t distinct = std::min<int64_t>(num_calls_, std::max<int64_t>(calls, 4));
    const int64_t q_rows = int64_t{c.num_tokens} * c.num_heads;
    const int64_t out_rows = int64_t{c.num_tokens} * c.num_heads_padded;
    auto* q = own(device_array<uint16_t>(distinct * q_rows * kHeadDim));
    auto* out = own(device_array<uint16_t>(distinct * out_rows * kHeadDim));
    auto* kv = own(device_array<uint16_t>(distinct * c.num_tokens * kHeadDim));
    fill_bf16<<<1024, 256>>>(q, distinct * q_rows * kHeadDim, 1);
    fill_bf16<<<1024, 256>>>(kv, distinct * c.num_tokens * kHeadDim, 2);
    CUDA_OK(cudaGetLastError());

    const int64_t num_slots = (distinct * c.num_tokens + kBlockSize - 1) / kBlockSize * kBlockSize;
    auto* cache = own(device_array<char>(num_slots * kV4RecordBytes));
    std::vector<int64_t> slots(num_slots);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), random);
    std::vector<int64_t> positions(distinct * c.num_tokens);
    for (auto& position : positions) position = random() % kMaxPosition;
    auto* slot_mapping = own(upload(slots));
    auto* position_ids = own(upload(positions));

    for (int call = 0; call < num_calls_; ++call) {
      const int64_t i = call % distinct;
      FusedInsertParams p;
      p.num_tokens = p.num_insert_tokens = c.num_tokens;
      p.eps = 1e-6f;
      p.query_output = QueryOutput::kFloat16;
      p.num_heads = c.num_heads;
      p.num_heads_padded = c.num_heads_padded;
      p.q_in = {q + i * q_rows * kHeadDim, c.num_heads * 1024, 1024, 32};
      p.q_out = {out + i * out_rows * kHeadDim, c.num_heads_padded * 1024, 1024, 32};
      p.kv = kv + i * c.num_tokens * kHeadDim;
      p.kv_token_stride = 1024;
      p.cache = cache;
      p.cache_block_stride = kBlockSize * kV4RecordBytes;
      p.num_slots = num_slots;
      p.cache_block_size = kBlockSize;
      p.slot_mapping = slot_mapping + i * c.num_tokens;
      p.position_ids = position_ids + i * c.num_tokens;
      p.cos_sin_cache = cos_sin;
      p.max_position = kMaxPosition;
      params_.push_back(p);
    }
    out_ = out;
    out_bytes_ = distinct * out_rows * kHeadDim * 2;
    cache_ = cache;
    cache_bytes_ = num_slots * kV4RecordBytes;
    hash_ = own(device_array<unsigned long long>(1));
    CUDA_OK(cudaDeviceSynchronize());
  }
  ~Workload() {
    for (void* p : owned_) cudaFree(p);
  }

  // A hash of all that one pass of calls writes over poison.
  unsigned long long hash(const FusedInsertTuning& tuning,
                          const stable_common::DeviceProperties& device,
                          cudaStream_t stream) const {
    CUDA_OK(cudaMemsetAsync(out_, 0xff, out_bytes_, stream));
    CUDA_OK(cudaMemsetAsync(cache_, 0xff, cache_bytes_, stream));
    for (const FusedInsertParams& params : params_) {
      CUDA_OK(launch_fused_insert(params, tuning, device, stream));
    }
    unsigned long long sum = 0;
    CUDA_OK(cudaMemsetAsync(hash_, 0, sizeof(sum), stream));
    hash_words<<<1024, 256, 0, stream>>>(static_cast<const uint32_t*>(out_), out_bytes_ / 4, hash_);
    hash_words<<<1024, 256, 0, stream>>>(static_cast<const uint32_t*>(cache_), cache_bytes_ / 4,
                                         hash_);
    CUDA_OK(cudaGetLastError());
    CUDA_OK(cudaMemcpyAsync(&sum, hash_, sizeof(sum), cudaMemcpyDeviceToHost, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    return sum;
  }

  // Median microseconds a call.
  float time(const FusedInsertTuning& tuning, const stable_common::DeviceProperties& device,
             cudaStream_t stream) const {
    std::vector<cudaGraphExec_t> graphs;
    for (int first = 0; first < num_calls_; first += kCallsPerGraph) {
      cudaGraph_t graph;
      CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
      for (int i = first; i < first + kCallsPerGraph; ++i) {
        CUDA_OK(launch_fused_insert(params_[i], tuning, device, stream));
      }
      CUDA_OK(cudaStreamEndCapture(stream, &graph));
      cudaGraphExec_t executable;
      CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
      CUDA_OK(cudaGraphDestroy(graph));
      graphs.push_back(executable);
    }
    cudaEvent_t begin, end;
    CUDA_OK(cudaEventCreate(&begin));
    CUDA_OK(cudaEventCreate(&end));
    const int rounds = graphs.size() == 1 ? 2 : 1;
    std::vector<float> times;
    for (int repetition = -2; repetition < kRepetitions; ++repetition) {
      CUDA_OK(cudaEventRecord(begin, stream));
      for (int round = 0; round < rounds; ++round) {
        for (cudaGraphExec_t graph : graphs) CUDA_OK(cudaGraphLaunch(graph, stream));
      }
      CUDA_OK(cudaEventRecord(end, stream));
      CUDA_OK(cudaStreamSynchronize(stream));
      float milliseconds = 0;
      CUDA_OK(cudaEventElapsedTime(&milliseconds, begin, end));
      if (repetition >= 0) times.push_back(1000 * milliseconds / (rounds * num_calls_));
    }
    for (cudaGraphExec_t graph : graphs) CUDA_OK(cudaGraphExecDestroy(graph));
    CUDA_OK(cudaEventDestroy(begin));
    CUDA_OK(cudaEventDestroy(end));
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  }

 private:
  template <typename T>
  T* own(T* p) {
    owned_.push_back(p);
    return p;
  }

  int num_calls_ = 0;
  void* out_ = nullptr;
  int64_t out_bytes_ = 0;
  void* cache_ = nullptr;
  int64_t cache_bytes_ = 0;
  unsigned long long* hash_ = nullptr;
  std::vector<FusedInsertParams> params_;
  std::vector<void*> owned_;
};

}  // namespace

int main() {
  stable_common::DeviceProperties device;
  cudaDeviceProp properties;
  cudaStream_t stream;
  CUDA_OK(cudaSetDevice(0));
  CUDA_OK(stable_common::get_device_properties(0, &device));
  CUDA_OK(cudaGetDeviceProperties(&properties, 0));
  CUDA_OK(cudaStreamCreate(&stream));
  std::vector<float> table(kMaxPosition * kRopeDim);
  std::mt19937 random(3);
  for (auto& value : table) value = std::uniform_real_distribution<float>(-1, 1)(random);
  const float* cos_sin = upload(table);

  std::printf("{\"device\": \"%s\", \"cases\": [", properties.name);
  const char* separator = "\n";
  for (const auto& [heads, padded] : {std::pair{64, 64}, {16, 64}, {128, 128}, {8, 8}}) {
    for (int tokens : {1, 4, 16, 64, 128, 256, 512, 1024, 2048, 8192}) {
      const Case c{tokens, heads, padded};
      const Workload workload(c, cos_sin);
      const auto expected = workload.hash(tunings().front(), device, stream);
      for (const FusedInsertTuning& tuning : tunings()) {
        if (workload.hash(tuning, device, stream) != expected) {
          std::fprintf(stderr, "%d tokens of %d heads: %d lanes, %d warps write other bits\n",
                       tokens, heads, tuning.lanes_per_head, tuning.warps_per_block);
          return 1;
        }
        const float us = workload.time(tuning, device, stream);
        std::printf(
            "%s{\"tokens\": %d, \"heads\": %d, \"heads_padded\": %d, "
            "\"lanes_per_head\": %d, \"warps_per_block\": %d, \"prefetch\": %s, "
            "\"us\": %.3f, \"tb_per_s\": %.3f}",
            separator, tokens, heads, padded, tuning.lanes_per_head, tuning.warps_per_block,
            tuning.prefetch ? "true" : "false", us, c.bytes() / us * 1e-6);
        separator = ",\n";
      }
      std::fflush(stdout);
    }
  }
  std::printf("\n]}\n");
}
