// The all-reduce kernels.
//
// Vector i of a message is handled by the same thread of the same block on every rank. Of its peers
// a thread waits for what that thread there has sent, and for what their first block announces. So
// blocks need not all be resident at once, as long as they start in the order of their numbers, as
// they do: the lowest block that is not done on any rank is there on all, and can go on.
//
// A slot is written again two calls later, by a peer that has finished the call between. For that
// it had this rank's descriptor of that call, which is sent after the call that used the slot had
// ended here, all of the slot read and cleared. So two slots are enough, and no rank ever waits for
// another to have read. The order is that of grids in a stream: what a grid has stored is performed
// before wait_for_previous_grid() returns in the next, which announces itself after that. No fence
// is needed between one word and the next: each says itself that it has come.
#pragma once

#include "exchange.cuh"
#include "stable_common/launch.h"
#include "vectors.cuh"

namespace custom_ar {

namespace device {

constexpr int kWarpSize = 32;

static_assert(kControlThreads == kWarpSize);

using Call = stable_common::PeerCall;

// Waits until every peer has announced this call, and returns whether all announced the same. By
// one warp; each of its lanes gets the answer for its own peer.
__device__ __forceinline__ bool peers_agree(const AllReduceParams& params, int world_size,
                                            uint32_t call) {
  const int peer = threadIdx.x;
  if (peer >= world_size || peer == params.rank) return true;
  const uint32_t slot = SharedHeader::descriptor_slot(call);
  const uint64_t* address = &params.buffers[params.rank]->descriptors[slot][peer];
  const uint64_t expected = stable_common::descriptor_of(params, call);
  Patience patience(params, call, params.timeout_ns);
  for (;;) {
    const uint64_t announced = stable_common::load_header_word<AllReduceParams>(address);
    if (announced == expected) return true;
    if (((announced ^ expected) & stable_common::kDescriptorCallMask) == 0) {
      stable_common::fail(params, stable_common::FailureKind::kDisagreement, 1u << peer, call,
                          announced);
      return false;
    }
    if (!patience.keep_waiting(1u << peer)) return false;
  }
}

// What the control warp does while the others exchange data. Returns whether the call may go on.
__device__ __forceinline__ bool control_call(const AllReduceParams& params, int world_size,
                                             const Call& begun) {
  const uint32_t call = begun.number;
  if (begun.has_failed) {
    stable_common::Failures<AllReduceParams>(params).adopt(params, call);
    return false;
  }
  using Claim = stable_common::Claim<AllReduceParams>;
  SharedHeader* own = params.buffers[params.rank];
  const int peer = threadIdx.x;
  // First of all: what is sent after the data waits for it in the link. So also by a rank whose
  // call before has failed since this grid began. That does no harm: no peer completes this call,
  // since this rank's data does not come, and see CallHeader.
  if (blockIdx.x == 0 && peer < world_size && peer != params.rank) {
    stable_common::announce_call(params, params.buffers[peer], call);
  }
  // All asked for at once, and looked at once the peers are there. The claim by the lane that has
  // no peer to wait for, so that a failure is said at once.
  const bool is_first = blockIdx.x == 0 && threadIdx.x == params.rank;
  const Claim claim = is_first ? Claim::take(own, call) : Claim::none(call);
  // Again: the call before may have failed since this grid began.
  const stable_common::Failures<AllReduceParams> failures(params);

  bool is_alive = peers_agree(params, world_size, call);
  if (failures.adopt(params, call)) is_alive = false;
  if (!claim.is_alone(call)) {
    stable_common::fail(params, stable_common::FailureKind::kConcurrentCall, 0, call, 0);
    is_alive = false;
  }
  return is_alive;
}

// Counts this block's part of the call as completed. By one thread, after all of the block's.
__device__ __forceinline__ void end_call(const AllReduceParams& params) {
  stable_common::end_call<AllReduceParams>(params.buffers[params.rank],
                                           stable_common::block_part());
}

__device__ __forceinline__ int64_t count_vectors(const AllReduceParams& params) {
  return (params.num_bytes + kVectorBytes - 1) / kVectorBytes;
}

// This rank's failure as the grids before this one left it, zero if there is none. After
// wait_for_previous_grid(), by threads that are about to send: the call before may have failed
// since this grid began, and a peer that is still in an earlier call would take what is sent now
// for that call's. Asked for together with the input, so it costs no wait of its own; an ordinary
// load, which L1 answers for most warps of a multiprocessor, since all ask for the same word.
__device__ __forceinline__ uint64_t load_own_failure(const AllReduceParams& params) {
  return SharedHeader::from_stored(params.buffers[params.rank]->failure);
}

// The number of this thread among those of the grid that move data.
__device__ __forceinline__ int64_t data_thread() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x - kControlThreads) + threadIdx.x -
         kControlThreads;
}

// Before wait_for_previous_grid(): fetches a vector of the input towards where it will be read.
__device__ __forceinline__ void prefetch_vector(const AllReduceParams& params, int64_t index,
                                                int64_t num_vectors) {
  constexpr int kVectorsPerLine = 128 / kVectorBytes;
  if (index < num_vectors && threadIdx.x % kVectorsPerLine == 0) {
    stable_common::prefetch_to_l2(static_cast<const char*>(params.input) + index * kVectorBytes);
  }
}

// A rank's side of one piece of a message, as one thread sees it.
template <typename Element, int kWorldSize>
class Exchange {
 public:
  __device__ Exchange(const AllReduceParams& params, uint32_t call)
      : params_(params),
        call_(call),
        num_vectors_(count_vectors(params)),
        shard_vectors_((num_vectors_ + kWorldSize - 1) / kWorldSize) {}

  __device__ __forceinline__ uint4 load(int64_t index) const {
    return load_vector<Element>(params_, index);
  }
  __device__ __forceinline__ void store(int64_t index, uint4 v) const {
    store_vector<Element>(params_, index, v);
  }
  __device__ __forceinline__ void poison(int64_t index) const {
    store(index, make_uint4(kNaNWord, kNaNWord, kNaNWord, kNaNWord));
  }

  // Sends `v` to place `place` of this rank's `region` in every peer's slot. The peers are served
  // in turn, each rank beginning with the next one, so that no rank is everybody's first.
  __device__ __forceinline__ void send_to_all(int64_t region_offset, int64_t region_vectors,
                                              int64_t place, uint4 v) const {
    const uint4 encoded = encode(v);
#pragma unroll
    for (int step = 1; step < kWorldSize; ++step) {
      const int peer = peer_after(step);
      store_shared_vector(
          address(peer, region_offset, region_vectors, source_index(params_.rank, peer), place),
          encoded);
    }
  }

  // The peers' vectors, in rank order, this rank left out.
  using PeerVectors = uint4[kWorldSize - 1];

  __device__ __forceinline__ int peer_rank(int source) const {
    return source + (source >= params_.rank ? 1 : 0);
  }

  // Waits for place `place` of every peer's region, and clears it. `is_sent` says of each rank
  // whether it sends anything there.
  template <typename IsSent>
  __device__ __forceinline__ bool receive(int64_t region_offset, int64_t region_vectors,
                                          int64_t place, PeerVectors& vectors, Patience& patience,
                                          const IsSent& is_sent) const {
    for (;;) {
      uint32_t absent = 0;
#pragma unroll
      for (int source = 0; source < kWorldSize - 1; ++source) {
        if (is_sent(peer_rank(source))) {
          vectors[source] = load_shared_vector(
              address(params_.rank, region_offset, region_vectors, source, place));
        }
      }
#pragma unroll
      for (int source = 0; source < kWorldSize - 1; ++source) {
        if (is_sent(peer_rank(source)) && !has_arrived(vectors[source])) {
          absent |= 1u << peer_rank(source);
        }
      }
      if (absent == 0) break;
      if (!patience.keep_waiting(absent)) return false;
    }
#pragma unroll
    for (int source = 0; source < kWorldSize - 1; ++source) {
      if (is_sent(peer_rank(source))) {
        store_shared_vector(address(params_.rank, region_offset, region_vectors, source, place),
                            make_uint4(0, 0, 0, 0));
        vectors[source] = decode(vectors[source]);
      }
    }
    return true;
  }

  // Vector `index` of the sum of all ranks' inputs, given the peers' vectors. This rank's is loaded
  // again: kept over the wait for the peers it would cost registers, and so resident blocks.
  __device__ __forceinline__ uint4 sum(int64_t index, const PeerVectors& vectors) const {
    const uint4 own = decode(encode(load(index)));  // as the peers receive it
    return sum_ranks<Element, kWorldSize>(own, params_.rank, vectors);
  }

  // Loads vector `place` of each peer's shard of this rank's input, in the order in which scatter()
  // sends them. The compiler moves no load across a store to a peer.
  __device__ __forceinline__ void load_shards(int64_t place, PeerVectors& vectors) const {
#pragma unroll
    for (int step = 1; step < kWorldSize; ++step) {
      const int64_t index = shard_index(step, place);
      if (index < num_vectors_) vectors[step - 1] = load(index);
    }
  }

  // Sends each peer its shard's vector `place`: those that load_shards() loaded, or one after the
  // other, which takes fewer registers.
  __device__ __forceinline__ void scatter(int64_t place, const PeerVectors& vectors) const {
    scatter_from(place, [&](int step, int64_t) { return vectors[step - 1]; });
  }
  __device__ __forceinline__ void scatter(int64_t place) const {
    scatter_from(place, [&](int, int64_t index) { return load(index); });
  }

  // The second region of a slot under the two-shot algorithm.
  __device__ int64_t gather_offset() const {
    return (kWorldSize - 1) * shard_vectors_ * kVectorBytes;
  }

 private:
  __device__ __forceinline__ int peer_after(int step) const {
    const int peer = params_.rank + step;
    return peer >= kWorldSize ? peer - kWorldSize : peer;
  }

  // Which vector of the message is vector `place` of the shard of peer_after(step).
  __device__ __forceinline__ int64_t shard_index(int step, int64_t place) const {
    return peer_after(step) * shard_vectors_ + place;
  }

  template <typename Source>
  __device__ __forceinline__ void scatter_from(int64_t place, const Source& source) const {
#pragma unroll
    for (int step = 1; step < kWorldSize; ++step) {
      const int peer = peer_after(step);
      const int64_t index = shard_index(step, place);
      if (index < num_vectors_) {
        store_shared_vector(
            address(peer, 0, shard_vectors_, source_index(params_.rank, peer), place),
            encode(source(step, index)));
      }
    }
  }

  __device__ __forceinline__ char* address(int rank, int64_t region_offset, int64_t region_vectors,
                                           int source, int64_t place) const {
    return slot_of(params_, rank, call_) + region_offset +
           (source * region_vectors + place) * kVectorBytes;
  }

  const AllReduceParams& params_;
  uint32_t call_;
  int64_t num_vectors_;
  int64_t shard_vectors_;
};

struct All {
  __device__ bool operator()(int) const { return true; }
};

}  // namespace device

// Every rank sends its vectors to all peers and sums what it receives: one crossing of the link,
// (world size - 1) times the message.
template <typename Element, int kWorldSize>
__global__ void __launch_bounds__(kMaxDataThreads + kControlThreads)
    one_shot_kernel(const __grid_constant__ AllReduceParams params) {
  using namespace device;
  const bool is_control = threadIdx.x < kControlThreads;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x - kControlThreads);
  const int64_t num_vectors = count_vectors(params);
  int64_t index = is_control ? num_vectors : data_thread();
  prefetch_vector(params, index, num_vectors);

  const Call call = stable_common::begin_call(params);
  stable_common::wait_for_previous_grid();
  stable_common::allow_next_grid();

  const Exchange<Element, kWorldSize> exchange(params, call.number);
  Patience patience(params, call.number, params.timeout_ns);
  typename Exchange<Element, kWorldSize>::PeerVectors vectors;
  bool is_alive = !call.has_failed;

  if (is_control) is_alive = control_call(params, kWorldSize, call);
  if (is_alive && index < num_vectors) {
    const uint64_t failure = load_own_failure(params);
    const uint4 first = exchange.load(index);
    is_alive = failure == 0;
    if (is_alive) {
      exchange.send_to_all(0, num_vectors, index, first);
      for (int ahead = 1; ahead < params.depth; ++ahead) {
        const int64_t next = index + ahead * stride;
        if (next < num_vectors) exchange.send_to_all(0, num_vectors, next, exchange.load(next));
      }
      is_alive = exchange.receive(0, num_vectors, index, vectors, patience, All());
    }
  }
  // Nothing is written before the ranks are known to agree.
  is_alive = __syncthreads_and(is_alive);
  // Of the shared buffer, that was all where a thread has one vector.
  const bool is_single_round = num_vectors <= stride;
  if (is_single_round && threadIdx.x == 0) end_call(params);

  while (index < num_vectors) {
    if (is_alive) {
      exchange.store(index, exchange.sum(index, vectors));
      const int64_t next = index + params.depth * stride;
      if (next < num_vectors) exchange.send_to_all(0, num_vectors, next, exchange.load(next));
    } else {
      exchange.poison(index);
    }
    index += stride;
    if (is_alive && index < num_vectors) {
      is_alive = exchange.receive(0, num_vectors, index, vectors, patience, All());
    }
  }

  if (is_single_round) return;
  __syncthreads();
  if (threadIdx.x == 0) end_call(params);
}

// Reduce-scatter, then all-gather: each rank sums a shard of the message and sends the sum to all.
// Two crossings, 2 * (world size - 1) / (world size) times the message.
template <typename Element, int kWorldSize>
__global__ void __launch_bounds__(kMaxDataThreads + kControlThreads)
    two_shot_kernel(const __grid_constant__ AllReduceParams params) {
  using namespace device;
  const bool is_control = threadIdx.x < kControlThreads;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x - kControlThreads);
  const int64_t num_vectors = count_vectors(params);
  const int64_t shard_vectors = (num_vectors + kWorldSize - 1) / kWorldSize;
  // Past the last place, and past where its gathering ends: nothing to do.
  const int64_t first = is_control ? shard_vectors + stride : data_thread();
#pragma unroll
  for (int r = 0; r < kWorldSize; ++r) {
    if (first < shard_vectors) prefetch_vector(params, r * shard_vectors + first, num_vectors);
  }

  const Call call = stable_common::begin_call(params);
  stable_common::wait_for_previous_grid();
  stable_common::allow_next_grid();

  const Exchange<Element, kWorldSize> exchange(params, call.number);
  const int64_t own_shard = params.rank * shard_vectors;
  Patience patience(params, call.number, params.timeout_ns);
  // What a peer sends after it has received from others is waited for longer than they wait, so
  // that the rank which does not come is named, and not the one that waits for it.
  Patience gather_patience(params, call.number, params.timeout_ns + params.timeout_ns / 4);
  typename Exchange<Element, kWorldSize>::PeerVectors vectors;
  bool is_alive = !call.has_failed;

  if (is_control) is_alive = control_call(params, kWorldSize, call);
  const auto receive_shard = [&](int64_t place) {
    return own_shard + place >= num_vectors ||
           exchange.receive(0, shard_vectors, place, vectors, patience, All());
  };
  if (is_alive && first < shard_vectors) {
    const uint64_t failure = load_own_failure(params);
    exchange.load_shards(first, vectors);
    is_alive = failure == 0;
    if (is_alive) {
      exchange.scatter(first, vectors);
      for (int ahead = 1; ahead < params.depth; ++ahead) {
        const int64_t next = first + ahead * stride;
        if (next < shard_vectors) exchange.scatter(next);
      }
      is_alive = receive_shard(first);
    }
  }
  // Nothing is written before the ranks are known to agree.
  is_alive = __syncthreads_and(is_alive);

  // Place by place: sum and send the shard's vector, then fetch the others' of the place before,
  // which have had that long to come.
  for (int64_t place = first; place < shard_vectors + stride; place += stride) {
    if (place < shard_vectors) {
      if (is_alive && place != first) is_alive = receive_shard(place);
      const int64_t index = own_shard + place;
      if (index < num_vectors) {
        if (is_alive) {
          // As the peers receive it.
          const uint4 sum = decode(encode(exchange.sum(index, vectors)));
          exchange.send_to_all(exchange.gather_offset(), shard_vectors, place, sum);
          exchange.store(index, sum);
        } else {
          exchange.poison(index);
        }
      }
      const int64_t next = place + params.depth * stride;
      if (is_alive && next < shard_vectors) exchange.scatter(next);
    }
    const int64_t before = place - stride;
    if (before < 0 || before >= shard_vectors) continue;
    const auto exists = [&](int peer) { return peer * shard_vectors + before < num_vectors; };
    if (is_alive) {
      is_alive = exchange.receive(exchange.gather_offset(), shard_vectors, before, vectors,
                                  gather_patience, exists);
    }
#pragma unroll
    for (int source = 0; source < kWorldSize - 1; ++source) {
      const int peer = exchange.peer_rank(source);
      if (!exists(peer)) continue;
      const int64_t index = peer * shard_vectors + before;
      if (is_alive) {
        exchange.store(index, vectors[source]);
      } else {
        exchange.poison(index);
      }
    }
  }

  __syncthreads();
  if (threadIdx.x == 0) end_call(params);
}

}  // namespace custom_ar
