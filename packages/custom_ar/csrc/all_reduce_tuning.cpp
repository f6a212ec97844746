// Which tuning a call gets. Two ranks: from the figures in benchmarks/results/tuning_*.json. More
// ranks: from the same figures by what a rank sends, since more GPUs were not there to measure on.
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
    {4 * kKiB, 4, 64, 1},      {8 * kKiB, 8, 64, 1},     {32 * kKiB, 32, 64, 1},
    {64 * kKiB, 64, 64, 1},    {128 * kKiB, 128, 64, 1}, {256 * kKiB, 128, 128, 1},
    {512 * kKiB, 264, 128, 1}, {kMiB, 528, 128, 1},
};

// By the size of a rank's shard.
constexpr TuningEntry kTwoShot[] = {
    {128 * kKiB, 128, 64, 1}, {512 * kKiB, 132, 128, 2}, {kMiB, 264, 256, 1},
    {2 * kMiB, 264, 512, 1},  {4 * kMiB, 256, 512, 2},   {8 * kMiB, 528, 512, 2},
};

// The largest message that goes in one shot. Two ranks send as much either way, and the crossing
// that one shot spares counts for less the longer a message takes. More ranks send world_size / 2
// times as much in one shot.
constexpr int64_t one_shot_limit(int world_size) {
  return world_size == 2 ? kMiB : 512 * kKiB / (world_size - 1);
}

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
  return num_bytes <= one_shot_limit(world_size)
             ? look_up(Algorithm::kOneShot, kOneShot, num_bytes)
             : look_up(Algorithm::kTwoShot, kTwoShot, divide_up(num_bytes, world_size));
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
