// How a warp holds rows of 512, and what it computes over them.
//
// A row is 64 chunks of 8 elements, 16 bytes each. `kLanes` neighbouring lanes share a row; lane l
// of them holds chunks l, l + kLanes, l + 2 * kLanes and so on, so that each load of the warp reads
// whole lines. The rotated dimensions are the last 8 chunks.
#pragma once

#include "fused_insert.h"
#include "stable_common/vector.cuh"

namespace deepseek_mla::device {

using stable_common::Packed2;

constexpr int kWarpSize = 32;
constexpr int kChunkElements = 8;
constexpr int kChunkBytes = 16;
constexpr int kChunksPerPiece = kPieceBytes / kChunkBytes;
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
//
// Here and elsewhere not __ldg(): the compiler may move such loads above the wait for the previous
// grid, which may have written what they read.
__device__ __forceinline__ Rotation load_rotation(const FusedInsertParams& params, int64_t position,
                                                  int rope_chunk) {
  const float* row = params.cos_sin_cache + position * kRopeDim + rope_chunk * 4;
  return {*reinterpret_cast<const float4*>(row),
          *reinterpret_cast<const float4*>(row + kRopeDim / 2)};
}

// (e, o) -> (e c - o s, e s + o c), with the roundings that the contract fixes.
__device__ __forceinline__ float2 rotate(float2 pair, float cos, float sin) {
  return make_float2(__fmaf_rn(pair.x, cos, -__fmul_rn(pair.y, sin)),
                     __fmaf_rn(pair.x, sin, __fmul_rn(pair.y, cos)));
}

// Sum of squares over a row, the same bits in each of its lanes and for every kLanes: in order
// within a chunk, then chunks 32 apart, 16 apart and so on down to neighbours.
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
  return static_cast<char*>(rows.data) + token * rows.token_stride + head * rows.head_stride +
         (chunk / kChunksPerPiece) * rows.piece_stride + (chunk % kChunksPerPiece) * kChunkBytes;
}

}  // namespace deepseek_mla::device
