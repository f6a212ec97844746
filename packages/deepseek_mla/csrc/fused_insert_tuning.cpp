// Which tuning a call gets, from the figures in benchmarks/results/tuning_nvidia_h200.json.
#include <cstddef>
#include <cstdint>

#include "fused_insert.h"

namespace deepseek_mla {

namespace {

// The first entry that a call does not exceed is taken. Sizes are rows of the query's output per
// multiprocessor, so that a larger device keeps more of them in one wave.
struct TuningEntry {
  int64_t max_rows_per_multiprocessor;
  FusedInsertTuning tuning;
};

constexpr TuningEntry kTunings[] = {
    // The latency of one row is the time of the call, and more lanes shorten it.
    {2, {.lanes_per_head = 32, .warps_per_block = 4, .prefetch = true}},
    // All rows are resident at once. The fuller a multiprocessor, the more fewer instructions pay.
    {32, {.lanes_per_head = 16, .warps_per_block = 4, .prefetch = true}},
    {64, {.lanes_per_head = 8, .warps_per_block = 2, .prefetch = true}},
    // Two waves: prefetching fetches part of the first while the previous grid ends.
    {128, {.lanes_per_head = 16, .warps_per_block = 8, .prefetch = true}},
};

// Half of the rows or more are padding: prefetching the few that are read pays for longer.
constexpr TuningEntry kPaddedTunings[] = {
    {2, {.lanes_per_head = 32, .warps_per_block = 4, .prefetch = true}},
    {16, {.lanes_per_head = 16, .warps_per_block = 4, .prefetch = true}},
    {64, {.lanes_per_head = 8, .warps_per_block = 2, .prefetch = true}},
    {1024, {.lanes_per_head = 16, .warps_per_block = 4, .prefetch = true}},
};

// Many waves keep memory busy by themselves. Small blocks, which start at a pace near that of
// memory, reach the highest bandwidth.
constexpr FusedInsertTuning kManyRows = {
    .lanes_per_head = 16, .warps_per_block = 2, .prefetch = false};

// KV alone: a warp a row, however many.
constexpr FusedInsertTuning kKvOnly = {
    .lanes_per_head = 32, .warps_per_block = 4, .prefetch = true};

template <size_t kEntries>
FusedInsertTuning look_up(const TuningEntry (&table)[kEntries], int64_t rows,
                          int num_multiprocessors) {
  for (const TuningEntry& entry : table) {
    if (rows <= entry.max_rows_per_multiprocessor * num_multiprocessors) return entry.tuning;
  }
  return kManyRows;
}

}  // namespace

FusedInsertTuning choose_tuning(const FusedInsertParams& params,
                                const stable_common::DeviceProperties& device) {
  if (params.query_output == QueryOutput::kNone) return kKvOnly;
  const int64_t rows = static_cast<int64_t>(params.num_tokens) * params.num_heads_padded;
  const bool is_padding_mostly = params.num_heads_padded >= 2 * params.num_heads;
  return is_padding_mostly ? look_up(kPaddedTunings, rows, device.num_multiprocessors)
                           : look_up(kTunings, rows, device.num_multiprocessors);
}

}  // namespace deepseek_mla
