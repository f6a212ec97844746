// DeepSeek-V4 MLA prologue, one launch: RMSNorm and RoPE of every query head, and RoPE,
// quantisation and paged-cache insert of the KV row of every token.
//
// A row of 512 is 64 chunks of 8 elements, 16 bytes each. `kLanes` neighbouring lanes share a row;
// lane l of them holds chunks l, l + kLanes, l + 2 * kLanes and so on, so that each load of the
// warp reads whole lines. The rotated dimensions are the last 8 chunks.
#pragma once

#include "fused_insert.h"
#include "stable_common/fp8.cuh"
#include "stable_common/launch.h"
#include "stable_common/vector.cuh"

namespace deepseek_mla {

namespace device {

using stable_common::Packed2;

constexpr int kWarpSize = 32;
constexpr int kChunkElements = 8;
constexpr int kNumChunks = kHeadDim / kChunkElements;
constexpr int kFirstRopeChunk = kNopeDim / kChunkElements;
constexpr unsigned kFullWarp = 0xffffffffu;

// Four neighbouring pairs' cosines and sines: what one chunk needs.
struct Rotation {
  float4 cos;
  float4 sin;
};

__device__ __forceinline__ uint32_t& word(uint4& chunk, int i) {
  return reinterpret_cast<uint32_t*>(&chunk)[i];
}
__device__ __forceinline__ uint32_t word(const uint4& chunk, int i) {
  return reinterpret_cast<const uint32_t*>(&chunk)[i];
}
__device__ __forceinline__ float component(const float4& v, int i) {
  return reinterpret_cast<const float*>(&v)[i];
}

__device__ __forceinline__ int64_t load_position(const FusedInsertParams& params, int token) {
  return params.position_ids_are_int64 ? static_cast<const int64_t*>(params.position_ids)[token]
                                       : static_cast<const int32_t*>(params.position_ids)[token];
}

// `rope_chunk` counts from the first rotated chunk. The caller has checked `position`.
__device__ __forceinline__ Rotation load_rotation(const FusedInsertParams& params, int64_t position,
                                                  int rope_chunk) {
  const float* row = params.cos_sin_cache + position * kRopeDim + rope_chunk * 4;
  return {__ldg(reinterpret_cast<const float4*>(row)),
          __ldg(reinterpret_cast<const float4*>(row + kRopeDim / 2))};
}

// (e, o) -> (e c - o s, e s + o c), with the roundings that the contract fixes.
__device__ __forceinline__ float2 rotate(float2 pair, float cos, float sin) {
  return make_float2(__fmaf_rn(pair.x, cos, -__fmul_rn(pair.y, sin)),
                     __fmaf_rn(pair.x, sin, __fmul_rn(pair.y, cos)));
}

// Sum of squares over a row, the same bits in each of its lanes and for every kLanes: chunk by
// chunk in order, then chunks 32 apart, 16 apart and so on down to neighbours. Squares of 16-bit
// values are exact in fp32, so only these additions round.
template <typename Element, int kLanes>
__device__ __forceinline__ float sum_of_squares(const uint4 (&row)[kNumChunks / kLanes]) {
  constexpr int kChunks = kNumChunks / kLanes;
  float sums[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    sums[i] = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 v = Packed2<Element>::unpack(word(row[i], w));
      sums[i] = __fmaf_rn(v.x, v.x, sums[i]);
      sums[i] = __fmaf_rn(v.y, v.y, sums[i]);
    }
  }
#pragma unroll
  for (int half = kChunks / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] = __fadd_rn(sums[i], sums[i + half]);
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    sums[0] = __fadd_rn(sums[0], __shfl_xor_sync(kFullWarp, sums[0], offset));
  }
  return sums[0];
}

__device__ __forceinline__ float reciprocal_rms(float sum_of_squares, float eps) {
  return __frsqrt_rn(__fadd_rn(__fmul_rn(sum_of_squares, 1.0f / kHeadDim), eps));
}

__device__ __forceinline__ char* piece_address(const QueryRows& rows, int token, int head,
                                               int chunk) {
  constexpr int kChunksPerPiece = 2;
  return static_cast<char*>(rows.data) + token * rows.token_stride + head * rows.head_stride +
         (chunk / kChunksPerPiece) * rows.piece_stride + (chunk % kChunksPerPiece) * 16;
}

// Norm and RoPE of 32 / kLanes heads of one token, from `first_head` on.
template <typename Element, QueryOutput kOutput, int kLanes>
__device__ __forceinline__ void process_heads(const FusedInsertParams& params, int token,
                                              int first_head) {
  constexpr int kChunks = kNumChunks / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int head = first_head + threadIdx.x % kWarpSize / kLanes;
  const bool is_stored = head < params.num_heads_padded;
  const bool is_loaded = head < params.num_heads;

  // First, since the cosines and sines hang on it.
  const int64_t position = params.apply_q_rope ? load_position(params, token) : -1;

  // Chunk i of this lane is i * kLanes + lane: kLanes is even, so its piece is a fixed step on.
  uint4 row[kChunks];
  const char* source = piece_address(params.q_in, token, head, lane);
  const int64_t source_step = kLanes / 2 * params.q_in.piece_stride;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    row[i] =
        is_loaded ? stable_common::load_16_bytes(source + i * source_step) : make_uint4(0, 0, 0, 0);
  }

  // Only the last chunks of a row rotate, and only in the lanes that hold the last 8.
  const int rope_chunk = (kChunks - 1) * kLanes + lane - kFirstRopeChunk;
  const bool is_rotated =
      is_loaded && rope_chunk >= 0 && position >= 0 && position < params.max_position;
  Rotation rotation;
  if (is_rotated) rotation = load_rotation(params, position, rope_chunk);

  float scale = 1.0f;
  if (params.apply_q_norm) {
    scale = reciprocal_rms(sum_of_squares<Element, kLanes>(row), params.eps);
    // A padding head must stay zero whatever eps is.
    if (!is_loaded) scale = 0.0f;
  }
  const float output_scale = kOutput == QueryOutput::kE4M3 ? __ldg(params.q_scale) : 1.0f;

  constexpr int kOutputBytes = kOutput == QueryOutput::kE4M3 ? 8 : 16;
  char* destination = nullptr;
  int64_t destination_step = 0;
  if constexpr (kOutput == QueryOutput::kE4M3) {
    destination = static_cast<char*>(params.q_out.data) + token * params.q_out.token_stride +
                  head * params.q_out.head_stride + lane * kOutputBytes;
    destination_step = kLanes * kOutputBytes;
  } else {
    destination = piece_address(params.q_out, token, head, lane);
    destination_step = kLanes / 2 * params.q_out.piece_stride;
  }

#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    float2 values[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      values[w] = Packed2<Element>::unpack(word(row[i], w));
      values[w].x = __fmul_rn(values[w].x, scale);
      values[w].y = __fmul_rn(values[w].y, scale);
    }
    if (i == kChunks - 1 && is_rotated) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        values[w] = rotate(values[w], component(rotation.cos, w), component(rotation.sin, w));
      }
    }
    if constexpr (kOutput == QueryOutput::kE4M3) {
      uint32_t bytes[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        bytes[w] = stable_common::to_e4m3x2(__fmul_rn(values[w].x, output_scale),
                                            __fmul_rn(values[w].y, output_scale));
      }
      if (is_stored) {
        *reinterpret_cast<uint2*>(destination + i * destination_step) =
            make_uint2(bytes[0] | bytes[1] << 16, bytes[2] | bytes[3] << 16);
      }
    } else {
      uint4 chunk;
#pragma unroll
      for (int w = 0; w < 4; ++w) word(chunk, w) = Packed2<Element>::pack(values[w]);
      if (is_stored) *reinterpret_cast<uint4*>(destination + i * destination_step) = chunk;
    }
  }
}

// The KV row: one warp, two chunks a lane. Lane l holds chunks l and l + 32, so the rotated chunks
// are the second ones of the last eight lanes.
constexpr int kKvChunks = 2;

template <typename Element>
__device__ __forceinline__ void normalize_kv(const FusedInsertParams& params, int lane,
                                             uint4 (&row)[kKvChunks]) {
  const float scale = reciprocal_rms(sum_of_squares<Element, kWarpSize>(row), params.eps);
#pragma unroll
  for (int i = 0; i < kKvChunks; ++i) {
    const int first = (i * kWarpSize + lane) * kChunkElements;
    float2 weights[4];
    if (params.kv_norm_weight_is_float32) {
      const auto* source = static_cast<const float*>(params.kv_norm_weight) + first;
#pragma unroll
      for (int w = 0; w < 4; ++w) weights[w] = __ldg(reinterpret_cast<const float2*>(source) + w);
    } else {
      const auto* source = static_cast<const Element*>(params.kv_norm_weight) + first;
      const uint4 packed = __ldg(reinterpret_cast<const uint4*>(source));
#pragma unroll
      for (int w = 0; w < 4; ++w) weights[w] = Packed2<Element>::unpack(word(packed, w));
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 v = Packed2<Element>::unpack(word(row[i], w));
      word(row[i], w) =
          Packed2<Element>::pack(make_float2(__fmul_rn(__fmul_rn(v.x, scale), weights[w].x),
                                             __fmul_rn(__fmul_rn(v.y, scale), weights[w].y)));
    }
  }
}

template <typename Element>
__device__ __forceinline__ float chunk_max_abs(const uint4& chunk) {
  const uint32_t pair = Packed2<Element>::max_abs(Packed2<Element>::max_abs(chunk.x, chunk.y),
                                                  Packed2<Element>::max_abs(chunk.z, chunk.w));
  const float2 halves = Packed2<Element>::unpack(pair);
  return fmaxf(halves.x, halves.y);
}

// What a quantisation block of E4M3 values is stored with.
struct BlockScale {
  uint8_t byte;      // E8M0
  float reciprocal;  // of the value that `byte` stands for
};

__device__ __forceinline__ BlockScale block_scale(float max_abs) {
  constexpr float kLeastMaxAbs = 1e-4f;
  // fmaxf drops a NaN: the scale comes from the block's numbers.
  max_abs = fmaxf(max_abs, kLeastMaxAbs);
  // E8M0 has no infinity; its NaN makes the whole block read back as NaN.
  if (isinf(max_abs)) return {stable_common::kE8M0NaN, 0.0f};
  const int exponent = stable_common::e4m3_block_exponent(max_abs);
  return {static_cast<uint8_t>(exponent + stable_common::kE8M0Bias),
          stable_common::exp2_integer(-exponent)};
}

template <typename Element>
__device__ __forceinline__ uint2 quantize_chunk(const uint4& chunk, float reciprocal) {
  uint32_t bytes[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 v = Packed2<Element>::unpack(word(chunk, w));
    bytes[w] = stable_common::to_e4m3x2(__fmul_rn(v.x, reciprocal), __fmul_rn(v.y, reciprocal));
  }
  return make_uint2(bytes[0] | bytes[1] << 16, bytes[2] | bytes[3] << 16);
}

// Quantises in blocks of kBlock elements and stores values and scales. The scale of a chunk that
// stays 16-bit (V4's rotated ones) is the zero that pads the record's scales.
template <typename Element, int kBlock, bool kKeepRope>
__device__ __forceinline__ void store_packed(const uint4 (&row)[kKvChunks], int lane, char* data,
                                             char* scales) {
  constexpr int kLanesPerBlock = kBlock / kChunkElements;
#pragma unroll
  for (int i = 0; i < kKvChunks; ++i) {
    const int chunk = i * kWarpSize + lane;
    float max_abs = chunk_max_abs<Element>(row[i]);
#pragma unroll
    for (int offset = kLanesPerBlock / 2; offset > 0; offset /= 2) {
      max_abs = fmaxf(max_abs, __shfl_xor_sync(kFullWarp, max_abs, offset));
    }
    const BlockScale scale = block_scale(max_abs);
    const bool is_kept = kKeepRope && chunk >= kFirstRopeChunk;
    if (is_kept) {
      // Two halves: a V4 record may lie at any multiple of 8 bytes.
      auto* kept = reinterpret_cast<uint2*>(data + kNopeDim + (chunk - kFirstRopeChunk) * 16);
      kept[0] = make_uint2(row[i].x, row[i].y);
      kept[1] = make_uint2(row[i].z, row[i].w);
    } else {
      *reinterpret_cast<uint2*>(data + chunk * kChunkElements) =
          quantize_chunk<Element>(row[i], scale.reciprocal);
    }
    if (chunk % kLanesPerBlock == 0) {
      scales[chunk / kLanesPerBlock] = static_cast<char>(is_kept ? 0 : scale.byte);
    }
  }
}

template <typename Element, typename Stored>
__device__ __forceinline__ void store_float16(const uint4 (&row)[kKvChunks], int lane, char* data) {
#pragma unroll
  for (int i = 0; i < kKvChunks; ++i) {
    uint4 chunk;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      word(chunk, w) = Packed2<Stored>::pack(Packed2<Element>::unpack(word(row[i], w)));
    }
    reinterpret_cast<uint4*>(data)[i * kWarpSize + lane] = chunk;
  }
}

template <typename Element>
__device__ __forceinline__ void store_e4m3(const uint4 (&row)[kKvChunks], int lane, char* data,
                                           float scale) {
#pragma unroll
  for (int i = 0; i < kKvChunks; ++i) {
    uint32_t bytes[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 v = Packed2<Element>::unpack(word(row[i], w));
      bytes[w] = stable_common::to_e4m3x2(__fdiv_rn(v.x, scale), __fdiv_rn(v.y, scale));
    }
    reinterpret_cast<uint2*>(data)[i * kWarpSize + lane] =
        make_uint2(bytes[0] | bytes[1] << 16, bytes[2] | bytes[3] << 16);
  }
}

struct CacheSlot {
  int64_t block;
  int64_t offset;  // in the block
};

__device__ __forceinline__ CacheSlot locate_slot(const FusedInsertParams& params, int64_t slot) {
  const auto index = static_cast<uint32_t>(slot);
  const uint32_t block = index / params.cache_block_size;
  return {block, index - block * params.cache_block_size};
}

// RoPE, quantisation and insert of one token's KV row, by one warp.
template <typename Element>
__device__ __forceinline__ void insert_kv(const FusedInsertParams& params, int token) {
  const int64_t position = load_position(params, token);
  const int64_t slot = params.slot_mapping[token];
  const int lane = threadIdx.x % kWarpSize;
  const char* source =
      static_cast<const char*>(params.kv) + token * params.kv_token_stride + lane * 16;
  uint4 row[kKvChunks];
#pragma unroll
  for (int i = 0; i < kKvChunks; ++i) {
    row[i] = stable_common::load_16_bytes(source + i * kWarpSize * 16);
  }
  // The whole warp decides alike: everything here is the token's.
  if (slot < 0 || slot >= params.num_slots || position < 0 || position >= params.max_position) {
    return;
  }

  const int rope_chunk = (kKvChunks - 1) * kWarpSize + lane - kFirstRopeChunk;
  Rotation rotation;
  if (rope_chunk >= 0) rotation = load_rotation(params, position, rope_chunk);
  if (params.kv_norm_weight != nullptr) normalize_kv<Element>(params, lane, row);
  if (rope_chunk >= 0) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t& pair = word(row[kKvChunks - 1], w);
      pair = Packed2<Element>::pack(rotate(Packed2<Element>::unpack(pair),
                                           component(rotation.cos, w), component(rotation.sin, w)));
    }
  }

  const CacheSlot at = locate_slot(params, slot);
  char* block = static_cast<char*>(params.cache) + at.block * params.cache_block_stride;
  char* record = block + at.offset * params.cache_token_stride;
  switch (params.cache_format) {
    case CacheFormat::kPackedV4:
      store_packed<Element, kV4QuantBlock, true>(
          row, lane, block + at.offset * kV4DataBytes,
          block + params.cache_block_size * kV4DataBytes + at.offset * kV4ScaleBytes);
      break;
    case CacheFormat::kPackedV41:
      store_packed<Element, kV41QuantBlock, false>(row, lane, record, record + kHeadDim);
      break;
    case CacheFormat::kBFloat16:
      store_float16<Element, __nv_bfloat16>(row, lane, record);
      break;
    case CacheFormat::kFloat16:
      store_float16<Element, __half>(row, lane, record);
      break;
    case CacheFormat::kE4M3:
      store_e4m3<Element>(row, lane, record, __ldg(params.kv_scale));
      break;
  }
}

__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Brings what a warp will read into L2 while the previous grid still runs, so that a small call
// does not wait for memory twice, once for positions and once for what they index. L2 is where the
// GPU's writes meet: what the previous grid has yet to write is updated there.
//
// The position is read before that grid is known to be done with it. If it changes, the wrong
// cosines were prefetched, and no more than that: the work below reads it again.
template <int kLanes>
__device__ __forceinline__ void prefetch_inputs(const FusedInsertParams& params, bool is_kv,
                                                int token, int first_head) {
  constexpr int kLineBytes = 128;
  constexpr int kLinesPerRow = kHeadDim * 2 / kLineBytes;
  const int lane = threadIdx.x % kWarpSize;
  int64_t position = 0;
  if (params.position_ids_are_int64) {
    asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];"
                 : "=l"(position)
                 : "l"(static_cast<const int64_t*>(params.position_ids) + token));
  } else {
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];"
                 : "=r"(reinterpret_cast<int&>(position))
                 : "l"(static_cast<const int32_t*>(params.position_ids) + token));
  }
  if (is_kv) {
    prefetch_to_l2(params.slot_mapping + token);
    if (lane < kLinesPerRow) {
      prefetch_to_l2(static_cast<const char*>(params.kv) + token * params.kv_token_stride +
                     lane * kLineBytes);
    }
  } else {
    const int head = first_head + lane / kLinesPerRow;
    if (lane < kWarpSize / kLanes * kLinesPerRow && head < params.num_heads) {
      prefetch_to_l2(static_cast<const char*>(params.q_in.data) + token * params.q_in.token_stride +
                     head * params.q_in.head_stride + lane % kLinesPerRow * kLineBytes);
    }
  }
  constexpr int kLinesPerRotation = kRopeDim * 4 / kLineBytes;
  if (lane < kLinesPerRotation && position >= 0 && position < params.max_position) {
    prefetch_to_l2(params.cos_sin_cache + position * kRopeDim + lane * kLineBytes / 4);
  }
}

}  // namespace device

// Blocks of up to 256 threads on a multiprocessor. A lane of 8 holds 128 bytes of its row, a lane
// of 32 holds 32, and registers follow.
template <int kLanes>
constexpr int kMinBlocks = kLanes == 8 ? 4 : 5;

// The first blocks insert KV rows, a warp each: theirs is the longer chain of dependent loads. The
// others process query heads, 32 / kLanes a warp, the warps of a token next to each other.
struct FusedInsertGrid {
  int num_kv_blocks;
  int head_groups_per_token;
};

template <typename Element, QueryOutput kOutput, int kLanes>
__global__ void __launch_bounds__(256, kMinBlocks<kLanes>)
    fused_insert_kernel(const __grid_constant__ FusedInsertParams params, FusedInsertGrid grid,
                        bool prefetch) {
  constexpr int kHeadsPerWarp = device::kWarpSize / kLanes;
  const int warps_per_block = blockDim.x / device::kWarpSize;
  const int warp = threadIdx.x / device::kWarpSize;
  const int block = blockIdx.x;
  const bool is_kv = kOutput == QueryOutput::kNone || block < grid.num_kv_blocks;

  int token = block * warps_per_block + warp;
  int first_head = 0;
  if (!is_kv) {
    const unsigned unit = (block - grid.num_kv_blocks) * warps_per_block + warp;
    token = unit / static_cast<unsigned>(grid.head_groups_per_token);
    first_head = (unit - token * grid.head_groups_per_token) * kHeadsPerWarp;
  }
  const bool has_work = token < (is_kv ? params.num_insert_tokens : params.num_tokens);

  if (prefetch && has_work) device::prefetch_inputs<kLanes>(params, is_kv, token, first_head);
  stable_common::wait_for_previous_grid();
  stable_common::allow_next_grid();

  if (!has_work) return;
  if (is_kv) {
    device::insert_kv<Element>(params, token);
  } else if constexpr (kOutput != QueryOutput::kNone) {
    device::process_heads<Element, kOutput, kLanes>(params, token, first_head);
  }
}

}  // namespace deepseek_mla
