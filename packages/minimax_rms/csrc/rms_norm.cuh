// The RMSNorm kernel of tensor-parallel ranks, which sums the squares over all ranks inside.
//
// A team of warps reads a token's row once and keeps it in registers. It pushes the row's sums of
// squares to all peers, waits until theirs are there, and writes the normalized row: one crossing
// of the link, 8 bytes for each token and peer. Other teams' reads, exchanges and writes overlap.
//
// Every word says itself that it has arrived: it is not empty any more, and whoever has read it
// makes it empty again. A slot is written again two calls later, by a peer that has finished the
// call between. For that it had this rank's words of that call, which are sent after the call that
// used the slot had ended here, all of the slot read and cleared. So two slots are enough, and no
// rank ever waits for another to have read. The order is that of grids in a stream: what a grid has
// stored is performed before wait_for_previous_grid() returns in the next, which sends after that.
//
// A token is handled by the same team on all ranks, and blocks start in the order of their numbers.
// So blocks need not all be resident at once: the lowest block that some rank has not done is
// resident on each such rank, and on the others has sent its sums; so it gets on, with its tokens
// in the same order everywhere. And as every block has a token, no peer is done with a call, and
// fails in a later one, before all blocks of the call have begun here. Calls that ranks cut
// differently give the same results, but may need all blocks at once.
//
// A rank that has failed sends nothing more: a peer that is still in an earlier call could take it
// for that call's.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "rms_norm.h"
#include "stable_common/launch.h"
#include "stable_common/peer_call.cuh"
#include "stable_common/vector.cuh"

namespace minimax_rms {

namespace device {

constexpr int kWarpSize = 32;
using stable_common::kAllLanes;

// A row's sum has one order whatever the team, so that a token's result does not depend on the
// batch that it is in: chunk i of 32 vectors is added to column i % kColumns, in the order of i.
// Then columns are added to the column half of them below, until one is left, and lanes likewise.
// The columns of a team's warp are those that meet first.
constexpr int kColumns = 8;

struct Sums {
  float q;
  float k;
};

__device__ __forceinline__ Sums operator+(Sums a, Sums b) { return {a.q + b.q, a.k + b.k}; }

template <int kCount>
__device__ __forceinline__ Sums add_columns(const Sums (&columns)[kCount]) {
  if constexpr (kCount == 1) {
    return columns[0];
  } else {
    Sums half[kCount / 2];
#pragma unroll
    for (int c = 0; c < kCount / 2; ++c) half[c] = columns[c] + columns[c + kCount / 2];
    return add_columns(half);
  }
}

__device__ __forceinline__ Sums add_lanes(Sums sums) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    sums.q += __shfl_xor_sync(kAllLanes, sums.q, distance);
    sums.k += __shfl_xor_sync(kAllLanes, sums.k, distance);
  }
  return sums;
}

template <typename Element>
__device__ __forceinline__ float sum_squares(uint4 v) {
  using Values = stable_common::VectorValues<Element>;
  float values[Values::kCount];
  Values::unpack(v, values);
  float sum = values[0] * values[0];
#pragma unroll
  for (int i = 1; i < Values::kCount; ++i) sum = fmaf(values[i], values[i], sum);
  return sum;
}

// A thread's team, of those that share the block.
template <int kWarps>
struct Team {
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kMaxPerBlock = max_threads_of(kWarps) / kThreads;

  static __device__ __forceinline__ int per_block() {
    return kMaxPerBlock == 1 ? 1 : blockDim.x / kThreads;
  }
  static __device__ __forceinline__ int index() { return threadIdx.x / kThreads; }
  static __device__ __forceinline__ int thread() { return threadIdx.x % kThreads; }
  static __device__ __forceinline__ int warp() { return thread() / kWarpSize; }

  // Waits for the team's threads, and sees what they have written.
  static __device__ __forceinline__ void synchronize() {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else if constexpr (kMaxPerBlock == 1) {
      __syncthreads();
    } else {
      // Barrier 0 is __syncthreads().
      static_assert(kMaxPerBlock == 2);
      index() == 0 ? synchronize_at<1>() : synchronize_at<2>();
    }
  }

 private:
  // The barrier is a literal: for one in a register the block would take all 16 that it can have,
  // and a multiprocessor has too few of them for many such blocks. Aligned: a warp is of one team.
  template <int kBarrier>
  static __device__ __forceinline__ void synchronize_at() {
    asm volatile("barrier.sync.aligned %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
  }
};

// 1 / sqrt(x), less than a unit in the last place off, in fewer steps than __frsqrt_rn(), and
// without a branch.
__device__ __forceinline__ float reciprocal_sqrt(float x) {
  const float y = rsqrtf(x);
  const float error = fmaf(-x * y, y, 1.0f);
  // Not if x is 0 or infinite: then it is exact, and the error no number.
  return fabsf(error) < 1.0f ? fmaf(0.5f * y, error, y) : y;
}

template <typename Element>
__device__ __forceinline__ uint4 normalize(uint4 x, uint4 weight, float scale) {
  using Values = stable_common::VectorValues<Element>;
  float values[Values::kCount];
  float weights[Values::kCount];
  Values::unpack(x, values);
  Values::unpack(weight, weights);
#pragma unroll
  for (int i = 0; i < Values::kCount; ++i) values[i] = values[i] * scale * weights[i];
  return Values::pack(values);
}

// A warp's side of the exchange of one call. Lane r serves rank r; the upper half of the warp
// looks at what the peers announce.
class Exchange {
 public:
  static constexpr int kHalf = kWarpSize / 2;
  static_assert(kMaxRanks <= kHalf);

  // Before wait_for_previous_grid(): the workspace is not written by any grid.
  __device__ __forceinline__ explicit Exchange(const RmsNormParams& params)
      : params_(params),
        rank_(params.rank),
        num_ranks_(params.num_ranks),
        lane_(threadIdx.x % kWarpSize),
        source_(lane_ % kHalf),
        is_peer_(source_ < params.num_ranks && source_ != params.rank),
        header_(params.header(source_)) {
    const auto layout =
        reinterpret_cast<const int64_t*>(params.workspace[3 * params.num_ranks + 1]);
    comm_size_ = layout[1];
    places_ = Places(params.num_ranks, comm_size_, params.num_tokens);
    own_ = reinterpret_cast<WorkspaceHeader*>(
        __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(header_), params.rank));
  }

  __device__ __forceinline__ WorkspaceHeader* own() const { return own_; }
  __device__ __forceinline__ bool has_header() const { return holds_header(comm_size_); }
  __device__ __forceinline__ int64_t capacity() const {
    return capacity_of(params_.num_ranks, comm_size_);
  }
  // Whether the call is within it, without a division.
  __device__ __forceinline__ bool has_room() const {
    return params_.num_tokens * bytes_per_token(params_.num_ranks) <= call_bytes_of(comm_size_);
  }

  __device__ __forceinline__ void set_call(uint32_t call) {
    call_ = call;
    const int64_t slot = kHeaderBytes + (call % 2) * slot_bytes_of(comm_size_);
    const int64_t own_word = params_.rank * static_cast<int64_t>(sizeof(uint64_t));
    outbox_ = reinterpret_cast<char*>(header_) + slot + own_word;
    inbox_ = reinterpret_cast<char*>(own_) + slot + source_ * sizeof(uint64_t);
    stored_descriptor_ = WorkspaceHeader::to_stored(stable_common::descriptor_of(params_, call));
  }

  // Zero if this rank has not failed, as it is stored: to look at it is to wait for it.
  __device__ __forceinline__ uint64_t load_failure() const {
    return stable_common::load_shared(&own_->failure);
  }

  // By one warp of the grid, after wait_for_previous_grid().
  __device__ __forceinline__ void announce() const {
    if (is_peer_ && lane_ < kHalf) stable_common::announce_call(params_, header_, call_);
  }

  __device__ __forceinline__ void send(int64_t token, Sums sums) const {
    if (!is_peer_ || lane_ >= kHalf) return;
    stable_common::store_shared(word(outbox_, token), to_word(sums));
  }

  // Has a token's words at hand when they are looked at: since the slot's last use all that the
  // GPU has read and written since may have driven them out of L2. By one warp.
  __device__ __forceinline__ void prefetch(int64_t token) const {
    if (is_peer_ && lane_ < kHalf) stable_common::prefetch_to_l2(word(inbox_, token));
  }

  // Waits for all ranks' sums of a token, and adds them up in rank order, this rank's own among
  // them, into `sums`. By all lanes. Returns whether they came and all ranks make the same call.
  __device__ __forceinline__ bool receive(int64_t token, Sums* sums,
                                          stable_common::Patience<RmsNormParams>* patience) {
    // The upper half of the warp looks at what the peers announce, and the lane of this rank
    // whether it has failed, until all is well once: what all warps look at lies in one place.
    const bool waits = has_agreed_ ? is_peer_ && !is_announcement() : is_peer_ || is_guard();
    const uint64_t* address = is_guard()          ? &own_->failure
                              : is_announcement() ? &own_->descriptors[call_ % 2][source_]
                                                  : word(inbox_, token);
    uint64_t found = kEmptyWord;
    bool is_ready = !waits;
    for (;;) {
      if (!is_ready) {
        found = stable_common::load_shared(address);
        is_ready = is_guard()          ? found == kEmptyWord
                   : is_announcement() ? found == stored_descriptor_
                                       : has_arrived(found);
      }
      const uint32_t waiting = __ballot_sync(kAllLanes, !is_ready);
      if (waiting == 0) break;
      if ((waiting >> rank_ & 1) != 0 || disagrees(!is_ready && is_announcement(), found) ||
          !patience->warp_keeps_waiting((waiting | waiting >> kHalf) & 0xffffu)) {
        return false;
      }
    }
    has_agreed_ = true;
    const unsigned long long own = to_word(*sums);
    const unsigned long long received = is_guard() ? own : found;
    *sums = from_word(__shfl_sync(kAllLanes, received, 0));
    for (int r = 1; r < num_ranks_; ++r) {
      *sums = *sums + from_word(__shfl_sync(kAllLanes, received, r));
    }
    return true;
  }

  // Makes a token's words empty again. By one warp, once all that wait for them have them.
  __device__ __forceinline__ void clear(int64_t token) const {
    if (is_peer_ && lane_ < kHalf) stable_common::store_shared(word(inbox_, token), kEmptyWord);
  }

 private:
  // The upper half of the warp looks at what is announced, and the lane of this rank guards.
  __device__ __forceinline__ bool is_announcement() const { return lane_ >= kHalf; }
  __device__ __forceinline__ bool is_guard() const { return lane_ == rank_; }

  __device__ __forceinline__ uint64_t* word(char* box, int64_t token) const {
    return reinterpret_cast<uint64_t*>(box + places_.of(token) * bytes_per_token(num_ranks_));
  }

  static __device__ __forceinline__ uint64_t to_word(Sums sums) {
    return static_cast<uint64_t>(__float_as_uint(sums.k)) << 32 | __float_as_uint(sums.q);
  }
  static __device__ __forceinline__ Sums from_word(uint64_t word) {
    return {__uint_as_float(static_cast<uint32_t>(word)),
            __uint_as_float(static_cast<uint32_t>(word >> 32))};
  }
  static __device__ __forceinline__ bool has_arrived(uint64_t word) {
    constexpr uint32_t kEmptyHalf = static_cast<uint32_t>(kEmptyWord);
    return static_cast<uint32_t>(word) != kEmptyHalf &&
           static_cast<uint32_t>(word >> 32) != kEmptyHalf;
  }

  // Whether a peer has announced another call of this number.
  __device__ __forceinline__ bool disagrees(bool is_announced, uint64_t stored) const {
    using stable_common::kDescriptorCallMask;
    const uint64_t announced = WorkspaceHeader::from_stored(stored);
    const uint64_t expected = WorkspaceHeader::from_stored(stored_descriptor_);
    const bool differs = is_announced && announced != expected &&
                         ((announced ^ expected) & kDescriptorCallMask) == 0;
    if (differs) {
      stable_common::fail(params_, stable_common::FailureKind::kDisagreement, 1u << source_, call_,
                          announced);
    }
    return __any_sync(kAllLanes, differs);
  }

  const RmsNormParams& params_;
  int rank_;
  int num_ranks_;
  int lane_;
  int source_;
  bool is_peer_;
  WorkspaceHeader* header_;  // of `source_`
  WorkspaceHeader* own_;
  int64_t comm_size_;
  Places places_;
  uint32_t call_ = 0;
  char* outbox_ = nullptr;  // this rank's word of the first token, at `source_`
  char* inbox_ = nullptr;   // that rank's word of the first token, here
  uint64_t stored_descriptor_ = 0;
  bool has_agreed_ = false;  // the peers make this call, and none has failed
};

// A thread's part of a row: vectors kStrideBytes apart, those of q and then those of k. The vector
// that a count or an address begins with is the thread's first.
//
// If kEven is not 0, every thread has that many, of which q has six of seven: MiniMax-M2's rows. So
// the compiler knows what each is.
template <typename Element, int kWarps, int kEven = 0>
class Rows {
 public:
  static_assert(kEven % 7 == 0);
  static constexpr int kStride = Team<kWarps>::kThreads;
  static constexpr int kStrideBytes = kStride * kVectorBytes;
  // The columns that a thread adds to.
  static constexpr int kOwnColumns = kColumns / kWarps;

  // By value, so that no address needs the parameters again.
  __device__ __forceinline__ explicit Rows(const RmsNormParams& params)
      : q_bytes_(static_cast<int64_t>(params.q_vectors) * kVectorBytes),
        k_bytes_(static_cast<int64_t>(params.k_vectors) * kVectorBytes),
        input_stride_bytes_(params.input_stride_bytes),
        q_mean_factor_(params.q_mean_factor),
        k_mean_factor_(params.k_mean_factor),
        eps_(params.eps) {
    const int first = Team<kWarps>::thread();
    const int64_t offset = first * kVectorBytes;
    num_q_ = count(params.q_vectors - first);
    num_vectors_ = count(params.q_vectors + params.k_vectors - first);
    input_ = static_cast<const char*>(params.input) + offset;
    weight_q_ = static_cast<const char*>(params.weight_q) + offset;
    weight_k_ = static_cast<const char*>(params.weight_k) + offset - q_bytes_;
    output_q_ = static_cast<char*>(params.output_q) + offset;
    output_k_ = static_cast<char*>(params.output_k) + offset - q_bytes_;
  }

  __device__ __forceinline__ int num_vectors() const { return kEven > 0 ? kEven : num_vectors_; }
  __device__ __forceinline__ bool exists(int j) const { return j < num_vectors(); }
  __device__ __forceinline__ bool is_q(int j) const {
    return j < (kEven > 0 ? kEven / 7 * 6 : num_q_);
  }

  __device__ __forceinline__ const char* source(int64_t token) const {
    return input_ + token * input_stride_bytes_;
  }

  // Vector `j` of the row at `source`; zeros past its end.
  __device__ __forceinline__ uint4 load(const char* source, int j) const {
    return exists(j) ? stable_common::load_16_bytes(source + at(j)) : make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ uint4 load_weight(int j) const {
    return load(is_q(j) ? weight_q_ : weight_k_, j);
  }

  __device__ __forceinline__ void add_squares(Sums& sums, int j, uint4 vector) const {
    const float sum = sum_squares<Element>(vector);
    if constexpr (kEven > 0) {
      (is_q(j) ? sums.q : sums.k) += sum;
    } else {
      sums.q += is_q(j) ? sum : 0.0f;
      sums.k += is_q(j) ? 0.0f : sum;
    }
  }

  // Where the rows of q and of k go, in bytes from the first.
  struct Target {
    int64_t q;
    int64_t k;
  };
  __device__ __forceinline__ Target target(int64_t token) const {
    return {token * q_bytes_, token * k_bytes_};
  }

  __device__ __forceinline__ void store(Target target, int j, uint4 vector) const {
    if (exists(j)) {
      char* const row = is_q(j) ? output_q_ + target.q : output_k_ + target.k;
      *reinterpret_cast<uint4*>(row + at(j)) = vector;
    }
  }

  __device__ __forceinline__ void store_normalized(Target target, int j, uint4 vector, uint4 weight,
                                                   Sums scales) const {
    store(target, j, normalize<Element>(vector, weight, is_q(j) ? scales.q : scales.k));
  }

  __device__ __forceinline__ void poison(int64_t token) const {
    constexpr uint32_t kNaN = 0xffffffffu;  // of fp32, and two of fp16 or bf16
#pragma unroll 1
    for (int j = 0; exists(j); ++j) {
      store(target(token), j, make_uint4(kNaN, kNaN, kNaN, kNaN));
    }
  }

  // One of the threads that share a line asks for it.
  __device__ __forceinline__ void prefetch(int64_t token) const {
    constexpr int kVectorsPerLine = 128 / kVectorBytes;
    if (threadIdx.x % kVectorsPerLine != 0) return;
    const char* const row = source(token);
#pragma unroll 1
    for (int j = 0; exists(j); ++j) stable_common::prefetch_to_l2(row + at(j));
  }

  // What to multiply a row with, beside the weights.
  __device__ __forceinline__ Sums scales(Sums sums) const {
    return {reciprocal_sqrt(fmaf(sums.q, q_mean_factor_, eps_)),
            reciprocal_sqrt(fmaf(sums.k, k_mean_factor_, eps_))};
  }

 private:
  // How many of `remaining` vectors, the first of them included, are this thread's.
  static __device__ __forceinline__ int count(int remaining) {
    return remaining > 0 ? (remaining + kStride - 1) / kStride : 0;
  }
  static __device__ __forceinline__ int64_t at(int j) {
    return static_cast<int64_t>(j) * kStrideBytes;
  }

  const char* input_;
  const char* weight_q_;
  const char* weight_k_;  // as if q came before
  char* output_q_;
  char* output_k_;  // as if q came before
  int64_t q_bytes_;
  int64_t k_bytes_;
  int64_t input_stride_bytes_;
  float q_mean_factor_;
  float k_mean_factor_;
  float eps_;
  int num_q_;
  int num_vectors_;
};

// What a team multiplies its rows with: kept in registers, or read as they are needed, some at
// once.
template <typename TeamRows, int kVectors, bool kIsKept, int kCountAtOnce = kVectors>
class Weights {
 public:
  static constexpr int kAtOnce = kCountAtOnce;

  __device__ __forceinline__ void load(const TeamRows& rows) {
    if constexpr (kIsKept) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) kept_[j] = rows.load_weight(j);
    }
  }

  __device__ __forceinline__ uint4 get(const TeamRows& rows, int j) const {
    if constexpr (kIsKept) {
      return kept_[j];
    } else {
      return rows.load_weight(j);
    }
  }

 private:
  uint4 kept_[kIsKept ? kVectors : 1];
};

// One row as a team holds it: thread by thread, kVectors each in registers. Of a row that is wider
// than that, the rest is read again when it is written.
template <typename TeamRows, int kVectors, bool kIsWide>
class Row {
 public:
  __device__ __forceinline__ void load(const TeamRows& rows, int64_t token) {
    const char* const source = rows.source(token);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) vectors_[j] = rows.load(source, j);
  }

  // This thread's part.
  __device__ __forceinline__ Sums sum(const TeamRows& rows, int64_t token) const {
    Sums columns[TeamRows::kOwnColumns];
#pragma unroll
    for (int c = 0; c < TeamRows::kOwnColumns; ++c) columns[c] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      rows.add_squares(columns[j % TeamRows::kOwnColumns], j, vectors_[j]);
    }
    if constexpr (kIsWide) {
      static_assert(TeamRows::kOwnColumns == 1);
      const char* const source = rows.source(token);
#pragma unroll 1
      for (int j = kVectors; j < rows.num_vectors(); ++j) {
        rows.add_squares(columns[0], j, rows.load(source, j));
      }
    }
    return add_columns(columns);
  }

  template <typename TeamWeights>
  __device__ __forceinline__ void store(const TeamRows& rows, int64_t token,
                                        typename TeamRows::Target target,
                                        const TeamWeights& weights, Sums sums) const {
    const Sums scales = rows.scales(sums);
    // Several weights before anything is stored: the compiler loads nothing ahead of a store, which
    // may be to the same place, so each would be waited for.
    constexpr int kAtOnce = TeamWeights::kAtOnce;
#pragma unroll
    for (int first = 0; first < kVectors; first += kAtOnce) {
      uint4 some_weights[kAtOnce];
#pragma unroll
      for (int j = first; j < first + kAtOnce && j < kVectors; ++j) {
        some_weights[j - first] = weights.get(rows, j);
      }
#pragma unroll
      for (int j = first; j < first + kAtOnce && j < kVectors; ++j) {
        rows.store_normalized(target, j, vectors_[j], some_weights[j - first], scales);
      }
    }
    if constexpr (kIsWide) {
      const char* const source = rows.source(token);
#pragma unroll 1
      for (int j = kVectors; j < rows.num_vectors(); ++j) {
        rows.store_normalized(target, j, rows.load(source, j), rows.load_weight(j), scales);
      }
    }
  }

 private:
  uint4 vectors_[kVectors];
};

// The sums of a whole row from those of a team's threads, to all of them. `turn` is how many rows
// the team has had.
template <int kWarps>
__device__ __forceinline__ Sums add_up(Sums own, uint32_t turn) {
  if constexpr (kWarps == 1) {
    return add_lanes(own);
  } else {
    // Two, so that a warp may write the next row's while another still reads.
    __shared__ Sums shared[Team<kWarps>::kMaxPerBlock][2][kWarps][kWarpSize];
    auto& buffer = shared[Team<kWarps>::index()][turn % 2];
    const int lane = threadIdx.x % kWarpSize;
    buffer[Team<kWarps>::warp()][lane] = own;
    Team<kWarps>::synchronize();
    Sums columns[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) columns[w] = buffer[w][lane];
    return add_lanes(add_columns(columns));
  }
}

// Gives what the first warp of a team has received to the others.
template <int kWarps>
__device__ __forceinline__ bool share(bool is_alive, Sums* sums) {
  if constexpr (kWarps > 1) {
    struct Received {
      Sums sums;
      bool is_alive;
    };
    __shared__ Received shared[Team<kWarps>::kMaxPerBlock];
    Received& received = shared[Team<kWarps>::index()];
    if (Team<kWarps>::thread() == 0) received = {*sums, is_alive};
    Team<kWarps>::synchronize();
    *sums = received.sums;
    is_alive = received.is_alive;
  }
  return is_alive;
}

// A block's part of one call of several ranks.
class Call {
 public:
  // Every thread of the block calls this, before wait_for_previous_grid().
  __device__ __forceinline__ explicit Call(const RmsNormParams& params)
      : params_(params), exchange_(params) {
    number_ = 0;
    is_alive_ = false;
    if (exchange_.has_header()) {
      const stable_common::PeerCall call = stable_common::begin_call(params);
      number_ = call.number;
      is_alive_ = !call.has_failed;
    } else if (blockIdx.x == 0 && threadIdx.x == 0) {
      // Not even the number of the call has a place.
      using stable_common::FailureKind;
      stable_common::write_record(
          params.failure_record,
          stable_common::pack_failure(FailureKind::kOverCapacity, 0, number_),
          stable_common::descriptor_of(params, number_), exchange_.capacity());
    }
    exchange_.set_call(number_);
    claim_ = Claim::none(number_);
    failure_ = kEmptyWord;
    // Not later, when it would be in the way.
    part_ = stable_common::block_part();
    has_room_ = exchange_.has_room();
  }

  // The same after it. Asks for more than it waits for, so that all comes at once. `is_sender`: of
  // the warps that send.
  __device__ __forceinline__ void start(bool is_sender) {
    if (!is_alive_) {
      if (exchange_.has_header() && threadIdx.x < kWarpSize) {
        stable_common::Failures<RmsNormParams>(params_).adopt(params_, number_);
      }
      return;
    }
    if (is_sender) failure_ = exchange_.load_failure();
    if (!has_room_) {
      if (is_first_warp() && threadIdx.x == 0) {
        stable_common::fail(params_, stable_common::FailureKind::kOverCapacity, 0, number_,
                            exchange_.capacity());
      }
      is_alive_ = false;
    } else if (is_first_warp() && threadIdx.x == 0) {
      claim_ = Claim::take(exchange_.own(), number_);
    }
  }

  // The call before may have failed since this grid began. Then nothing may be sent: a peer that
  // is still in an earlier call could take it for that call's. Else lets the peers know of the
  // call.
  __device__ __forceinline__ void confirm() {
    stable_common::keep_here(failure_);
    if (__any_sync(kAllLanes, failure_ != kEmptyWord)) is_alive_ = false;
    if (is_alive_ && is_first_warp()) exchange_.announce();
  }

  __device__ __forceinline__ uint32_t number() const { return number_; }

  __device__ __forceinline__ void prefetch(int64_t token) const {
    if (is_alive_ && has_room_) exchange_.prefetch(token);
  }

  __device__ __forceinline__ void send(int64_t token, Sums sums) const {
    if (is_alive_) exchange_.send(token, sums);
  }

  // Turns this rank's sums of a token into those of all ranks. By all lanes of a warp. Returns
  // whether that succeeded.
  __device__ __forceinline__ bool receive(int64_t token, Sums* sums,
                                          stable_common::Patience<RmsNormParams>* patience) {
    // Before the wait: the peers need not be there for it.
    if (is_first_warp() && __any_sync(kAllLanes, is_alive_ && !claim_.is_alone(number_))) {
      if (threadIdx.x == 0) {
        stable_common::fail(params_, stable_common::FailureKind::kConcurrentCall, 0, number_, 0);
      }
      is_alive_ = false;
    }
    if (is_alive_) is_alive_ = exchange_.receive(token, sums, patience);
    return is_alive_;
  }

  __device__ __forceinline__ void clear(int64_t token) const { exchange_.clear(token); }

  // Lets the host know why a token is lost.
  __device__ __forceinline__ void report() const {
    if (exchange_.has_header()) stable_common::report_failure(params_);
  }

  // By one thread, after all of the block's.
  __device__ __forceinline__ void end() const {
    if (exchange_.has_header()) stable_common::end_call<RmsNormParams>(exchange_.own(), part_);
  }

 private:
  static __device__ __forceinline__ bool is_first_warp() {
    return blockIdx.x == 0 && threadIdx.x < kWarpSize;
  }

  using Claim = stable_common::Claim<RmsNormParams>;

  const RmsNormParams& params_;
  Exchange exchange_;
  Claim claim_;
  uint64_t failure_;
  uint64_t part_;
  uint32_t number_;
  bool has_room_;
  bool is_alive_;  // of a warp: nothing has failed yet
};

__device__ __forceinline__ void wait_and_allow() {
  stable_common::wait_for_previous_grid();
  stable_common::allow_next_grid();
}

// Which tokens a team takes, and when.
template <int kWarps>
struct Turns {
  int64_t first;
  int64_t stride;

  __device__ __forceinline__ Turns()
      : first(static_cast<int64_t>(blockIdx.x) * Team<kWarps>::per_block() + Team<kWarps>::index()),
        stride(static_cast<int64_t>(gridDim.x) * Team<kWarps>::per_block()) {}
};

}  // namespace device

// One rank alone: a plain RMSNorm.
template <typename Element, int kWarps, int kVectors, bool kIsWide, int kEven>
__global__ void __launch_bounds__(max_threads_of(kWarps), min_blocks_of(kWarps))
    lone_rms_norm_kernel(const __grid_constant__ RmsNormParams params) {
  using namespace device;
  using TeamRows = Rows<Element, kWarps, kEven>;
  const TeamRows rows(params);
  const Turns<kWarps> turns;
  if (turns.first < params.num_tokens) rows.prefetch(turns.first);
  wait_and_allow();

  uint32_t turn = 0;
  for (int64_t token = turns.first; token < params.num_tokens; token += turns.stride) {
    Row<TeamRows, kVectors, kIsWide> row;
    row.load(rows, token);
    Weights<TeamRows, kVectors, true> weights;
    weights.load(rows);
    if (token + turns.stride < params.num_tokens) rows.prefetch(token + turns.stride);
    row.store(rows, token, rows.target(token), weights,
              add_up<kWarps>(row.sum(rows, token), turn++));
  }
}

// The ranks' part of a call. If kIsPipelined, a team loads its next row while it waits for the
// peers; else it keeps its registers for the weights, to be done sooner with the one it has.
template <typename Element, int kWarps, int kVectors, bool kIsWide, int kEven, bool kIsPipelined>
__global__ void __launch_bounds__(max_threads_of(kWarps), min_blocks_of(kWarps))
    rms_norm_kernel(const __grid_constant__ RmsNormParams params) {
  using namespace device;
  using TeamRows = Rows<Element, kWarps, kEven>;
  using TeamRow = Row<TeamRows, kVectors, kIsWide>;
  constexpr int kFew = 4;  // vectors
  // Or so many that there are no registers for what they need otherwise.
  constexpr bool kKeepsWeights =
      !kIsPipelined && (kVectors <= kFew || (kEven > 0 && kVectors <= 7));
  constexpr int kWeightsAtOnce = kIsPipelined && kEven == 0 ? 2 : 4;
  const TeamRows rows(params);
  const Turns<kWarps> turns;
  // Who talks for the team, and who tidies up: the last warp, which may have less of the row.
  const bool is_leader = Team<kWarps>::warp() == 0;
  const bool is_closer = Team<kWarps>::warp() == kWarps - 1;
  const bool has_block = Team<kWarps>::per_block() == 1;
  int64_t token = turns.first;
  if (token < params.num_tokens) rows.prefetch(token);

  Call call(params);
  if (is_leader && token < params.num_tokens) call.prefetch(token);
  wait_and_allow();

  TeamRow row;
  if (token < params.num_tokens) row.load(rows, token);
  call.start(is_leader);
  bool is_lost = false;
  if (token < params.num_tokens) {
    // For all turns of the team: the timeout is a team's, not a wait's.
    stable_common::Patience<RmsNormParams> patience(params, call.number(), params.timeout_ns);
    call.confirm();
    for (uint32_t turn = 0;; ++turn) {
      Sums sums = add_up<kWarps>(row.sum(rows, token), turn);
      if (is_leader) call.send(token, sums);
      const int64_t next = token + turns.stride;
      const bool is_last = next >= params.num_tokens;
      if (is_leader && !is_last) call.prefetch(next);
      Weights<TeamRows, kVectors, kKeepsWeights, kWeightsAtOnce> weights;
      weights.load(rows);
      TeamRow next_row;
      if (!is_last) {
        if constexpr (kIsPipelined) {
          next_row.load(rows, next);
        } else {
          rows.prefetch(next);
        }
      }
      typename TeamRows::Target target = rows.target(token);
      if constexpr (kVectors <= kFew) {
        // While the peers' sums are under way; larger rows have no registers for it.
        stable_common::keep_here(target.q);
        stable_common::keep_here(target.k);
      }
      bool is_alive = false;
      if (is_leader) {
        is_alive = call.receive(token, &sums, &patience);
      }
      if (!share<kWarps>(is_alive, &sums)) {
        is_lost = true;
        break;
      }
      if (is_closer) {
        call.clear(token);
        // Before the last row is written: it is of no concern to who looks at the count.
        if (has_block && is_last && threadIdx.x % kWarpSize == 0) call.end();
      }
      row.store(rows, token, target, weights, sums);
      if (is_last) break;
      token = next;
      if constexpr (kIsPipelined) {
        row = next_row;
      } else {
        row.load(rows, token);
      }
    }
    if (has_block && !is_lost) return;
  }
  if (is_lost) {
    if (threadIdx.x % kWarpSize == 0) call.report();
#pragma unroll 1
    for (; token < params.num_tokens; token += turns.stride) rows.poison(token);
  }
  // Several teams, or one that has not said so.
  __syncthreads();
  if (threadIdx.x == 0) call.end();
}

}  // namespace minimax_rms
