// RMSNorm and RoPE of query heads.
#pragma once

#include "row.cuh"
#include "stable_common/fp8.cuh"

namespace deepseek_mla::device {

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
  const float output_scale = kOutput == QueryOutput::kE4M3 ? *params.q_scale : 1.0f;

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

}  // namespace deepseek_mla::device
