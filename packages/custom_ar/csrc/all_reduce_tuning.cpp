// Which tuning a call gets: from the figures of two and of four H200s in
// benchmarks/results/tuning_*.json. Other world sizes take the blocks of four by what a rank sends
// or sums, and where one shot ends follows from a model that the figures of both fit.
//
// All of it pushes. A kernel loads from a peer more slowly than it stores to it (`ceilings.kernels`
// in benchmarks/results/*.json), a pull has to wait for word that the data is there, and kernels
// that pull, torch's of symmetric memory, took longer at every size (`peers` there).
#include <algorithm>
#include <cstddef>

#include "all_reduce.h"

namespace custom_ar {

namespace {

constexpr int64_t kKiB = 1024;
constexpr int64_t kMiB = 1024 * kKiB;

// The first entry that `bytes` does not exceed is taken, and the last for all that is larger.
struct TuningEntry {
  int64_t bytes;
  int num_blocks;
  int threads_per_block;
  int depth;
};

// By the size of the message, of which each thread sends its part to all.
constexpr TuningEntry kOneShot[] = {
    {4 * kKiB, 4, 64, 1},      {8 * kKiB, 4, 128, 1},    {32 * kKiB, 32, 64, 1},
    {64 * kKiB, 64, 64, 1},    {128 * kKiB, 128, 64, 1}, {256 * kKiB, 128, 128, 1},
    {512 * kKiB, 264, 128, 1}, {kMiB, 528, 128, 1},
};

// By the size of a rank's shard: of two ranks, and of more, where a thread sends a vector of the
// input to each peer and the sum to all of them, so that fewer threads fill the link.
constexpr TuningEntry kTwoShotOfTwo[] = {
    {kMiB, 264, 256, 1},
    {2 * kMiB, 264, 512, 1},
    {4 * kMiB, 256, 512, 2},
    {8 * kMiB, 528, 512, 2},
};
constexpr TuningEntry kTwoShotOfMore[] = {
    {128 * kKiB, 64, 64, 2}, {256 * kKiB, 64, 128, 2}, {512 * kKiB, 528, 64, 1},
    {kMiB, 132, 512, 1},     {2 * kMiB, 528, 256, 1},  {4 * kMiB, 256, 512, 2},
    {8 * kMiB, 528, 512, 2},
};

// The largest message that goes in one shot, by world size from two on. Of n MiB and W ranks, one
// shot takes longer than two by
//   n (W - 1) (1 - 2 / W) 2.9 us, what it sends more, at the link's 360 GB/s,
//   + n (1 - 1 / W) 1.3 us, the sums of other ranks' shards,
//   - (1.15 + 0.375 (W - 2)) us, the second crossing,
// which is within 0.1 us of what was measured on two ranks from 256 KiB to 2 MiB, and on four from
// 128 to 512 KiB. Both are even at 1.76 MiB, 560 KiB, 366 KiB, 292 KiB, 253 KiB, 230 KiB and 213
// KiB for two to eight ranks. Two ranks keep to 1 MiB, since no size between that and 2 MiB was
// measured.
constexpr int64_t kOneShotLimitKiB[] = {1024, 560, 364, 292, 252, 230, 212};

constexpr int64_t one_shot_limit(int world_size) { return kOneShotLimitKiB[world_size - 2] * kKiB; }

template <size_t kEntries>
AllReduceTuning look_up(Algorithm algorithm, const TuningEntry (&table)[kEntries], int64_t bytes) {
  const TuningEntry* entry = table;
  while (entry != table + kEntries - 1 && bytes > entry->bytes) ++entry;
  return {algorithm, entry->num_blocks, entry->threads_per_block, entry->depth};
}

constexpr int64_t divide_up(int64_t dividend, int64_t divisor) {
  return (dividend + divisor - 1) / divisor;
}

// What a message of `num_bytes` takes of a slot.
constexpr int64_t slot_bytes_of(Algorithm algorithm, int world_size, int64_t num_bytes) {
  const int64_t peers = world_size - 1;
  const int64_t vectors = divide_up(num_bytes, kVectorBytes);
  const int64_t slot_vectors = algorithm == Algorithm::kOneShot
                                   ? peers * vectors
                                   : 2 * peers * divide_up(vectors, world_size);
  return slot_vectors * kVectorBytes;
}

}  // namespace

AllReduceTuning choose_tuning(int world_size, int64_t num_bytes) {
  if (num_bytes <= one_shot_limit(world_size)) {
    return look_up(Algorithm::kOneShot, kOneShot, num_bytes);
  }
  const int64_t shard_bytes = divide_up(num_bytes, world_size);
  return world_size == 2 ? look_up(Algorithm::kTwoShot, kTwoShotOfTwo, shard_bytes)
                         : look_up(Algorithm::kTwoShot, kTwoShotOfMore, shard_bytes);
}

AllReduceTuning limit_blocks(const AllReduceTuning& tuning, int max_blocks) {
  constexpr int kWarpSize = 32;
  if (tuning.num_blocks <= max_blocks) return tuning;
  const int64_t threads = int64_t{tuning.num_blocks} * tuning.threads_per_block;
  const int64_t warps = divide_up(threads, int64_t{max_blocks} * kWarpSize);
  AllReduceTuning limited = tuning;
  limited.num_blocks = max_blocks;
  limited.threads_per_block =
      static_cast<int>(std::min<int64_t>(warps * kWarpSize, kMaxDataThreads));
  return limited;
}

int64_t slot_bytes_for(int world_size, int64_t max_bytes) {
  const int64_t limit = one_shot_limit(world_size);
  const int64_t one_shot =
      slot_bytes_of(Algorithm::kOneShot, world_size, std::min(max_bytes, limit));
  return max_bytes <= limit
             ? one_shot
             : std::max(one_shot, slot_bytes_of(Algorithm::kTwoShot, world_size, max_bytes));
}

int64_t bytes_per_piece(Algorithm algorithm, int world_size, int64_t slot_bytes) {
  const int64_t slot_vectors = slot_bytes / kVectorBytes;
  const int64_t peers = world_size - 1;
  const int64_t vectors = algorithm == Algorithm::kOneShot
                              ? slot_vectors / peers
                              : slot_vectors / (2 * peers) * world_size;
  return vectors * kVectorBytes;
}

}  // namespace custom_ar
