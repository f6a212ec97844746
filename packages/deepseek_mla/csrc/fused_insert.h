// Launcher of the fused Q norm, RoPE, quantisation and cache insert. No torch header here or below.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "stable_common/device_properties.h"
#include "stable_common/dispatch.h"

namespace deepseek_mla {

constexpr int kHeadDim = 512;
constexpr int kRopeDim = 64;  // the last of kHeadDim
constexpr int kNopeDim = kHeadDim - kRopeDim;

// Packed records. V4: kNopeDim E4M3 values and kRopeDim 16-bit ones a token, and after all tokens
// of a block the scales, seven and a zero a token. V4.1: kHeadDim E4M3 values and 16 scales a
// token.
constexpr int kV4DataBytes = kNopeDim + 2 * kRopeDim;
constexpr int kV4ScaleBytes = 8;
constexpr int kV4RecordBytes = kV4DataBytes + kV4ScaleBytes;
constexpr int kV4QuantBlock = 64;
constexpr int kV41QuantBlock = 32;
constexpr int kV41RecordBytes = kHeadDim + kHeadDim / kV41QuantBlock;

enum class QueryOutput {
  kNone,     // KV alone
  kFloat16,  // the input's type
  kE4M3,
};

enum class CacheFormat {
  kPackedV4,
  kPackedV41,
  kBFloat16,  // 512 values a token
  kFloat16,
  kE4M3,
};

// A row of a head is stored in pieces of 16 elements: one after the other where rows are dense, all
// heads' first pieces, then all heads' second ones and so on where heads are interleaved.
constexpr int kPieceBytes = 32;

// A tensor of query rows, [num_tokens, num_heads, 512]. Strides are in bytes.
struct QueryRows {
  void* data = nullptr;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  int64_t piece_stride = 0;
};

struct FusedInsertParams {
  stable_common::Float16Type dtype = stable_common::Float16Type::kBFloat16;  // of q_in and kv
  int num_tokens = 0;
  int num_insert_tokens = 0;  // the first ones; the rest is padding
  float eps = 0.0f;

  QueryOutput query_output = QueryOutput::kNone;
  QueryRows q_in;
  QueryRows q_out;
  int num_heads = 0;
  int num_heads_padded = 0;  // of q_out: heads from num_heads on become zeros
  bool apply_q_norm = true;
  bool apply_q_rope = true;
  const float* q_scale = nullptr;  // one element; kE4M3 only

  const void* kv = nullptr;  // [num_tokens, 512]
  int64_t kv_token_stride = 0;
  const void* kv_norm_weight = nullptr;  // [512], or null for no norm
  bool kv_norm_weight_is_float32 = false;
  const float* kv_scale = nullptr;  // one element; kE4M3 only

  CacheFormat cache_format = CacheFormat::kPackedV4;
  void* cache = nullptr;
  int64_t cache_block_stride = 0;         // bytes
  int64_t cache_token_stride = 0;         // bytes; unused by kPackedV4
  int64_t num_slots = 0;                  // below 2^32: slots are divided in 32 bits
  uint32_t cache_block_size = 1;          // slots in a block
  const int64_t* slot_mapping = nullptr;  // [num_insert_tokens]

  const void* position_ids = nullptr;  // [num_tokens]
  bool position_ids_are_int64 = true;
  const float* cos_sin_cache = nullptr;  // [max_position, 64]: 32 cosines, then 32 sines
  int64_t max_position = 0;
};

// How the work is cut. A head's row is read by `lanes_per_head` lanes: the fewer, the more bytes
// each has in flight and the fewer shuffles a row costs; the more, the shorter one row takes.
struct FusedInsertTuning {
  int lanes_per_head = 16;  // 8, 16 or 32
  int warps_per_block = 2;  // up to 8
  // Prefetch the inputs while the previous grid finishes. Only with programmatic dependent launch.
  bool prefetch = false;
};

FusedInsertTuning choose_tuning(const FusedInsertParams& params,
                                const stable_common::DeviceProperties& device);

// Checks nothing and never blocks. Returns what the launch returned.
cudaError_t launch_fused_insert(const FusedInsertParams& params, const FusedInsertTuning& tuning,
                                const stable_common::DeviceProperties& device, cudaStream_t stream);

}  // namespace deepseek_mla
