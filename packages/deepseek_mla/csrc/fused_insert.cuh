// The kernel of the DeepSeek-V4 MLA prologue: query heads and KV rows of all tokens in one launch.
#pragma once

#include "kv_insert.cuh"
#include "query.cuh"
#include "stable_common/launch.h"
#include "stable_common/vector.cuh"

namespace deepseek_mla {

namespace device {

using stable_common::prefetch_to_l2;

// A load that may race with a store of the previous grid. Its value must not decide a result.
__device__ __forceinline__ int64_t load_early(const int64_t* address) {
  int64_t value;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(address));
  return value;
}
__device__ __forceinline__ int64_t load_early(const int32_t* address) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

// Brings what a warp will read into L2 while the previous grid still runs, so that a small call
// does not wait for memory twice, once for positions and once for what they index.
//
// If that grid changes the position, the wrong cosines were prefetched and no more than that: the
// work that follows reads the position again.
template <int kLanes>
__device__ __forceinline__ void prefetch_inputs(const FusedInsertParams& params, bool is_kv,
                                                int token, int first_head) {
  constexpr int kLineBytes = 128;
  constexpr int kLinesPerRow = kHeadDim * 2 / kLineBytes;
  constexpr int kHeadsPerWarp = kWarpSize / kLanes;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t position =
      params.position_ids_are_int64
          ? load_early(static_cast<const int64_t*>(params.position_ids) + token)
          : load_early(static_cast<const int32_t*>(params.position_ids) + token);
  if (is_kv) {
    if (lane == 0) prefetch_to_l2(params.slot_mapping + token);
    if (lane < kLinesPerRow) {
      prefetch_to_l2(static_cast<const char*>(params.kv) + token * params.kv_token_stride +
                     lane * kLineBytes);
    }
  } else if (params.q_in.piece_stride == kPieceBytes) {
    const int head = first_head + lane / kLinesPerRow;
    if (lane < kHeadsPerWarp * kLinesPerRow && head < params.num_heads) {
      prefetch_to_l2(piece_address(params.q_in, token, head,
                                   lane % kLinesPerRow * (kLineBytes / kChunkBytes)));
    }
  } else if (first_head < params.num_heads) {
    // Interleaved heads: a piece of the warp's heads is contiguous, and there are as many as lanes.
    prefetch_to_l2(piece_address(params.q_in, token, first_head, lane * kChunksPerPiece));
  }
  constexpr int kLinesPerRotation = kRopeDim * 4 / kLineBytes;
  if (lane < kLinesPerRotation && position >= 0 && position < params.max_position) {
    prefetch_to_l2(params.cos_sin_cache + position * kRopeDim + lane * (kLineBytes / 4));
  }
}

}  // namespace device

// Blocks of up to 256 threads on a multiprocessor, which bounds registers to 64 or 48. A lane of 8
// holds 128 bytes of its row, and a norm's weights take 16 registers.
template <QueryOutput kOutput, int kLanes>
constexpr int kMinBlocks = kOutput == QueryOutput::kNone || kLanes == 8 ? 4 : 5;

// The first blocks insert KV rows, a warp each: theirs is the longer chain of dependent loads. The
// others process query heads, 32 / kLanes a warp, the warps of a token next to each other.
struct FusedInsertGrid {
  int num_kv_blocks;
  int head_groups_per_token;
};

template <typename Element, QueryOutput kOutput, int kLanes>
__global__ void __launch_bounds__(256, kMinBlocks<kOutput, kLanes>)
    fused_insert_kernel(const __grid_constant__ FusedInsertParams params, FusedInsertGrid grid,
                        bool prefetch) {
  constexpr int kHeadsPerWarp = device::kWarpSize / kLanes;
  const int warps_per_block = blockDim.x / device::kWarpSize;
  const int warp = threadIdx.x / device::kWarpSize;
  const int block = blockIdx.x;
  const bool is_kv = kOutput == QueryOutput::kNone || block < grid.num_kv_blocks;

  int token = 0;
  int first_head = 0;
  if (is_kv) {
    token = block * warps_per_block + warp;
  } else {
    // Up to 2^31 - 1 warps, and those that fill the last block.
    const unsigned unit =
        static_cast<unsigned>(block - grid.num_kv_blocks) * warps_per_block + warp;
    token = unit / static_cast<unsigned>(grid.head_groups_per_token);
    first_head = (unit - token * grid.head_groups_per_token) * kHeadsPerWarp;
  }
  const bool has_work = token < (is_kv ? params.num_insert_tokens : params.num_tokens);

  if (prefetch && has_work) device::prefetch_inputs<kLanes>(params, is_kv, token, first_head);
  stable_common::wait_for_previous_grid();
  stable_common::allow_next_grid();

  if (!has_work) return;
  if (is_kv) {
    device::insert_kv<Element, kOutput == QueryOutput::kNone>(params, token);
  } else if constexpr (kOutput != QueryOutput::kNone) {
    device::process_heads<Element, kOutput, kLanes>(params, token, first_head);
  }
}

}  // namespace deepseek_mla
