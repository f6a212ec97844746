// Norm, RoPE, quantisation and paged-cache insert of KV rows.
#pragma once

#include "row.cuh"
#include "stable_common/fp8.cuh"

namespace deepseek_mla::device {

// The KV row: one warp, two chunks a lane. Lane l holds chunks l and l + 32, so the rotated chunks
// are the second ones of the last eight lanes.
constexpr int kKvChunks = 2;

// The weights of a lane's chunks, in fp32.
struct NormWeights {
  float2 pairs[kKvChunks][kChunkElements / 2];
};

template <typename Element>
__device__ __forceinline__ NormWeights load_norm_weights(const FusedInsertParams& params,
                                                         int lane) {
  NormWeights weights;
#pragma unroll
  for (int i = 0; i < kKvChunks; ++i) {
    const int first = (i * kWarpSize + lane) * kChunkElements;
    if (params.kv_norm_weight_is_float32) {
      const auto* source = static_cast<const float*>(params.kv_norm_weight) + first;
#pragma unroll
      for (int w = 0; w < 4; ++w) weights.pairs[i][w] = reinterpret_cast<const float2*>(source)[w];
    } else {
      const auto* source = static_cast<const Element*>(params.kv_norm_weight) + first;
      const uint4 packed = stable_common::load_16_bytes(source);
#pragma unroll
      for (int w = 0; w < 4; ++w) weights.pairs[i][w] = Packed2<Element>::unpack(word(packed, w));
    }
  }
  return weights;
}

template <typename Element>
__device__ __forceinline__ void normalize_kv(uint4 (&row)[kKvChunks], const NormWeights& weights,
                                             float eps) {
  const float scale = reciprocal_rms(sum_of_squares<Element, kWarpSize>(row), eps);
#pragma unroll
  for (int i = 0; i < kKvChunks; ++i) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 v = Packed2<Element>::unpack(word(row[i], w));
      const float2 weight = weights.pairs[i][w];
      word(row[i], w) = Packed2<Element>::pack(make_float2(
          __fmul_rn(__fmul_rn(v.x, scale), weight.x), __fmul_rn(__fmul_rn(v.y, scale), weight.y)));
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

// RoPE, quantisation and insert of one token's KV row, by one warp, after a norm if there are
// weights for one. Ops that process a query have none: without kMayNormalize, that code is left
// out.
template <typename Element, bool kMayNormalize>
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
  // All loads before the first of them is used: they wait for memory together.
  if (rope_chunk >= 0) rotation = load_rotation(params, position, rope_chunk);
  const float kv_scale = params.cache_format == CacheFormat::kE4M3 ? *params.kv_scale : 1.0f;
  if constexpr (kMayNormalize) {
    if (params.kv_norm_weight != nullptr) {
      normalize_kv<Element>(row, load_norm_weights<Element>(params, lane), params.eps);
    }
  }
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
      store_e4m3<Element>(row, lane, record, kv_scale);
      break;
  }
}

}  // namespace deepseek_mla::device
