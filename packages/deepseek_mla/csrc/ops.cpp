#include "ops.h"

#include <algorithm>
#include <limits>

#include "fused_insert.h"
#include "stable_common/allocate.h"
#include "stable_common/cuda_check.h"
#include "stable_common/device_properties.h"
#include "stable_common/stream.h"
#include "stable_common/tensor_check.h"

namespace deepseek_mla {

namespace {

using stable_common::Argument;
using stable_common::check;
using stable_common::Dim;
using stable_common::Float16Type;
using stable_common::ScalarType;

constexpr char kQuantInsert[] = "deepseek_mla::fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert";
constexpr char kKvRopeInsert[] = "deepseek_mla::fused_deepseek_v4_kv_rope_insert";
constexpr char kKvNormInsert[] = "deepseek_mla::fused_deepseek_v4_kv_norm_rope_quant_insert";
constexpr char kFullCacheBf16[] =
    "deepseek_mla::fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert";
constexpr char kFullCacheFp8[] =
    "deepseek_mla::fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert";

// The kernel reads and writes 16-bit rows 16 bytes at a time and E4M3 rows 8.
constexpr int64_t kRowAlignment = 16;
constexpr int64_t kE4M3RowAlignment = 8;

// Each group of arguments has one function that checks it and writes what the kernel needs of it.

Argument add_kv(FusedInsertParams& params, const char* op, const Tensor& tensor) {
  Argument kv(op, "kv", tensor);
  kv.has_dtype({ScalarType::BFloat16, ScalarType::Half})
      .has_shape({"N", kHeadDim})
      .is_dense_from(1)
      .is_aligned(kRowAlignment, 1);
  kv.require(kv.size(0) <= std::numeric_limits<int32_t>::max(),
             "must have at most 2147483647 rows, got ", kv.size(0));
  params.dtype =
      kv.dtype() == ScalarType::BFloat16 ? Float16Type::kBFloat16 : Float16Type::kFloat16;
  params.num_tokens = static_cast<int>(kv.size(0));
  params.kv = tensor.data_ptr();
  params.kv_token_stride = kv.stride_bytes(0);
  return kv;
}

void add_positions(FusedInsertParams& params, const char* op, const Argument& kv,
                   const Tensor& slot_mapping_tensor, const Tensor& position_ids_tensor,
                   const Tensor& cos_sin_cache_tensor) {
  const Argument slot_mapping(op, "slot_mapping", slot_mapping_tensor);
  slot_mapping.has_dtype({ScalarType::Long}).has_shape({"S"}).is_dense_from(0).is_on_device_of(kv);
  slot_mapping.require(slot_mapping.size(0) <= kv.size(0),
                       "must have at most kv.size(0) = ", kv.size(0), " elements, got ",
                       slot_mapping.size(0));
  params.num_insert_tokens = static_cast<int>(slot_mapping.size(0));
  params.slot_mapping = static_cast<const int64_t*>(slot_mapping_tensor.data_ptr());

  const Argument position_ids(op, "position_ids", position_ids_tensor);
  position_ids.has_dtype({ScalarType::Long, ScalarType::Int})
      .has_shape({Dim("N", kv.size(0), "kv.size(0)")})
      .is_dense_from(0)
      .is_on_device_of(kv);
  params.position_ids = position_ids_tensor.data_ptr();
  params.position_ids_are_int64 = position_ids.dtype() == ScalarType::Long;

  const Argument cos_sin_cache(op, "cos_sin_cache", cos_sin_cache_tensor);
  cos_sin_cache.has_dtype({ScalarType::Float})
      .has_shape({"max_pos", kRopeDim})
      .is_dense_from(0)
      .is_aligned(kRowAlignment)
      .is_on_device_of(kv);
  params.cos_sin_cache = static_cast<const float*>(cos_sin_cache_tensor.data_ptr());
  params.max_position = cos_sin_cache.size(0);
}

void add_slots(FusedInsertParams& params, const char* op, const Argument& k_cache,
               int64_t cache_block_size) {
  // Slots are divided by the block size in 32 bits; no memory holds more of them.
  constexpr int64_t kMaxSlots = std::numeric_limits<uint32_t>::max();
  check(cache_block_size >= 1 && cache_block_size <= kMaxSlots, op,
        "cache_block_size must be in [1, 4294967295], got ", cache_block_size);
  k_cache.require(k_cache.size(0) <= kMaxSlots / cache_block_size,
                  "must hold at most 4294967295 slots, got ", k_cache.size(0), " blocks of ",
                  cache_block_size);
  params.cache_block_size = static_cast<uint32_t>(cache_block_size);
  params.num_slots = k_cache.size(0) * cache_block_size;
  params.cache = k_cache.tensor().data_ptr();
  params.cache_block_stride = k_cache.stride_bytes(0);
}

// [num_blocks, bytes] or [num_blocks, cache_block_size, record], uint8.
void add_packed_cache(FusedInsertParams& params, const char* op, const Argument& kv,
                      const Tensor& tensor, int64_t cache_block_size, bool kv_mxfp8) {
  const Argument k_cache(op, "k_cache", tensor);
  const int64_t record = kv_mxfp8 ? kV41RecordBytes : kV4RecordBytes;
  k_cache.has_dtype({ScalarType::Byte}).is_on_device_of(kv);
  k_cache.require(k_cache.rank() == 2 || k_cache.rank() == 3,
                  "must have shape [num_blocks, bytes] or [num_blocks, cache_block_size, ", record,
                  "], got ", k_cache.shape());
  add_slots(params, op, k_cache, cache_block_size);
  if (k_cache.rank() == 3) {
    k_cache.has_shape(
        {"num_blocks", Dim("cache_block_size", cache_block_size, "the argument"), record});
  } else {
    k_cache.require(k_cache.size(1) / record >= cache_block_size,
                    "must have at least cache_block_size * ", record, " = ",
                    cache_block_size * record, " bytes a block, got shape ", k_cache.shape());
  }
  k_cache.is_dense_from(1).is_aligned(kE4M3RowAlignment, 1).has_no_overlap();
  params.cache_format = kv_mxfp8 ? CacheFormat::kPackedV41 : CacheFormat::kPackedV4;
  params.cache_token_stride = kV41RecordBytes;
}

// [num_blocks, cache_block_size, 512] of a floating-point type.
void add_full_cache(FusedInsertParams& params, const char* op, const Argument& kv,
                    const Argument& k_cache, int64_t cache_block_size) {
  k_cache.is_on_device_of(kv);
  k_cache.require(k_cache.rank() == 3, "must have shape [num_blocks, cache_block_size, ", kHeadDim,
                  "], got ", k_cache.shape());
  add_slots(params, op, k_cache, cache_block_size);
  const bool is_e4m3 = k_cache.dtype() == ScalarType::Float8_e4m3fn;
  k_cache
      .has_shape(
          {"num_blocks", Dim("cache_block_size", cache_block_size, "the argument"), kHeadDim})
      .is_dense_from(2)
      .is_aligned(is_e4m3 ? kE4M3RowAlignment : kRowAlignment, 2)
      .has_no_overlap();
  params.cache_token_stride = k_cache.stride_bytes(1);
  params.cache_format = is_e4m3                                   ? CacheFormat::kE4M3
                        : k_cache.dtype() == ScalarType::BFloat16 ? CacheFormat::kBFloat16
                                                                  : CacheFormat::kFloat16;
}

void add_float16_cache_dtype(const Argument& kv, const Argument& k_cache) {
  if (kv.dtype() == ScalarType::Half) {
    k_cache.has_dtype({ScalarType::BFloat16, ScalarType::Half});
  } else {
    k_cache.has_dtype({ScalarType::BFloat16});
  }
}

const float* scale_pointer(const char* op, const char* name, const Argument& kv,
                           const Tensor& tensor) {
  const Argument scale(op, name, tensor);
  scale.has_dtype({ScalarType::Float}).is_on_device_of(kv);
  scale.require(tensor.numel() == 1, "must have one element, got shape ", scale.shape());
  return static_cast<const float*>(tensor.data_ptr());
}

// How rows of heads lie in a contiguous 16-bit tensor.
QueryRows contiguous_rows(void* data, int64_t num_heads, bool is_interleaved) {
  constexpr int64_t kRowBytes = kHeadDim * 2;
  if (!is_interleaved) return {data, num_heads * kRowBytes, kRowBytes, kPieceBytes};
  return {data, num_heads * kRowBytes, kPieceBytes, num_heads * kPieceBytes};
}

// Checks rows of heads and returns how they lie. `tokens` is what their number must equal.
QueryRows query_rows(const Argument& q, const Argument& kv, const Dim& tokens, const Dim& heads,
                     bool is_interleaved) {
  q.has_shape({tokens, heads, kHeadDim}).is_on_device_of(kv);
  const bool is_e4m3 = q.dtype() == ScalarType::Float8_e4m3fn;
  q.is_dense_from(is_interleaved ? 0 : 2)
      .is_aligned(is_e4m3 ? kE4M3RowAlignment : kRowAlignment, 2);
  void* data = q.tensor().data_ptr();
  if (is_interleaved) return contiguous_rows(data, q.size(1), true);
  return {data, q.stride_bytes(0), q.stride_bytes(1), kPieceBytes};
}

void add_query(FusedInsertParams& params, const Argument& q, const Argument& kv, double eps,
               bool apply_q_norm, bool apply_q_rope, bool is_interleaved) {
  q.has_dtype_of(kv);
  params.q_in = query_rows(q, kv, Dim("N", kv.size(0), "kv.size(0)"), "H", is_interleaved);
  q.require(q.size(1) <= std::numeric_limits<int32_t>::max() / kHeadDim,
            "must have at most 4194303 heads, got ", q.size(1));
  params.num_heads = static_cast<int>(q.size(1));
  params.eps = static_cast<float>(eps);
  params.apply_q_norm = apply_q_norm;
  params.apply_q_rope = apply_q_rope;
}

// A grid holds at most 2^31 - 1 blocks, and a block at least one warp, which does at least one
// head.
void check_work(const FusedInsertParams& params, const char* op) {
  const int64_t warps =
      static_cast<int64_t>(params.num_tokens) * (params.num_heads_padded + int64_t{1});
  check(warps <= std::numeric_limits<int32_t>::max(), op, "tokens * (heads + 1) must be at most ",
        std::numeric_limits<int32_t>::max(), ", got ", warps);
}

struct QuantInsertArguments {
  const Tensor& q_in;
  const Tensor& kv;
  const Tensor& k_cache;
  const Tensor& slot_mapping;
  const Tensor& position_ids;
  const Tensor& cos_sin_cache;
  int64_t q_head_padded;
  double eps;
  int64_t cache_block_size;
  bool apply_q_norm;
  bool kv_mxfp8;
  bool apply_q_rope;
  bool is_q_interleaved;
};

// Everything but the output, whose heads are params.num_heads_padded; zero of them is KV alone.
FusedInsertParams prepare_quant_insert(const QuantInsertArguments& arguments) {
  FusedInsertParams params;
  const Argument q(kQuantInsert, "q_in", arguments.q_in);
  q.has_dtype({ScalarType::BFloat16, ScalarType::Half});
  q.has_shape({"N", "H", kHeadDim});
  const Argument kv = add_kv(params, kQuantInsert, arguments.kv);
  kv.has_shape({Dim("N", q.size(0), "q_in.size(0)"), kHeadDim});
  add_query(params, q, kv, arguments.eps, arguments.apply_q_norm, arguments.apply_q_rope,
            arguments.is_q_interleaved);
  add_positions(params, kQuantInsert, kv, arguments.slot_mapping, arguments.position_ids,
                arguments.cos_sin_cache);
  add_packed_cache(params, kQuantInsert, kv, arguments.k_cache, arguments.cache_block_size,
                   arguments.kv_mxfp8);
  constexpr int64_t kMaxHeads = std::numeric_limits<int32_t>::max() / kHeadDim;
  check(arguments.q_head_padded == 0 ||
            (arguments.q_head_padded >= q.size(1) && arguments.q_head_padded <= kMaxHeads),
        kQuantInsert, "q_head_padded must be 0 or in [q_in.size(1) = ", q.size(1), ", ", kMaxHeads,
        "], got ", arguments.q_head_padded);
  params.num_heads_padded = static_cast<int>(arguments.q_head_padded);
  if (params.num_heads_padded > 0) params.query_output = QueryOutput::kFloat16;
  check_work(params, kQuantInsert);
  return params;
}

FusedInsertParams prepare_quant_insert_out(const QuantInsertArguments& arguments,
                                           const Tensor& q_out_tensor) {
  FusedInsertParams params = prepare_quant_insert(arguments);
  const Argument kv(kQuantInsert, "kv", arguments.kv);
  const Argument q_out(kQuantInsert, "q_out", q_out_tensor);
  q_out.has_dtype_of(kv);
  params.q_out =
      query_rows(q_out, kv, Dim("N", kv.size(0), "kv.size(0)"),
                 Dim("P", arguments.q_head_padded, "q_head_padded"), arguments.is_q_interleaved);
  q_out.has_no_overlap();
  return params;
}

FusedInsertParams prepare_kv_rope_insert(const Tensor& kv_tensor, const Tensor& k_cache_tensor,
                                         const Tensor& slot_mapping, const Tensor& position_ids,
                                         const Tensor& cos_sin_cache, int64_t cache_block_size,
                                         const std::optional<Tensor>& fp8_scale, bool kv_mxfp8) {
  FusedInsertParams params;
  const Argument kv = add_kv(params, kKvRopeInsert, kv_tensor);
  add_positions(params, kKvRopeInsert, kv, slot_mapping, position_ids, cos_sin_cache);
  // Wherever it is ignored, too: a tensor on another device would decide which kernels are called.
  if (fp8_scale) Argument(kKvRopeInsert, "fp8_scale", *fp8_scale).is_on_device_of(kv);
  const Argument k_cache(kKvRopeInsert, "k_cache", k_cache_tensor);
  if (kv.dtype() == ScalarType::Half) {
    k_cache.has_dtype(
        {ScalarType::Byte, ScalarType::BFloat16, ScalarType::Half, ScalarType::Float8_e4m3fn});
  } else {
    k_cache.has_dtype({ScalarType::Byte, ScalarType::BFloat16, ScalarType::Float8_e4m3fn});
  }
  if (k_cache.dtype() == ScalarType::Byte) {
    add_packed_cache(params, kKvRopeInsert, kv, k_cache_tensor, cache_block_size, kv_mxfp8);
    return params;
  }
  check(!kv_mxfp8, kKvRopeInsert, "kv_mxfp8 must be False unless k_cache is torch.uint8, got ",
        stable_common::dtype_name(k_cache.dtype()));
  add_full_cache(params, kKvRopeInsert, kv, k_cache, cache_block_size);
  if (params.cache_format == CacheFormat::kE4M3) {
    check(fp8_scale.has_value(), kKvRopeInsert,
          "fp8_scale must be a tensor where k_cache is torch.float8_e4m3fn, got None");
    params.kv_scale = scale_pointer(kKvRopeInsert, "fp8_scale", kv, *fp8_scale);
  }
  return params;
}

FusedInsertParams prepare_kv_norm_insert(const Tensor& kv_tensor, const Tensor& norm_weight_tensor,
                                         const Tensor& k_cache, const Tensor& slot_mapping,
                                         const Tensor& position_ids, const Tensor& cos_sin_cache,
                                         double eps, int64_t cache_block_size) {
  FusedInsertParams params;
  const Argument kv = add_kv(params, kKvNormInsert, kv_tensor);
  const Argument norm_weight(kKvNormInsert, "norm_weight", norm_weight_tensor);
  norm_weight.has_dtype({kv.dtype(), ScalarType::Float})
      .has_shape({kHeadDim})
      .is_dense_from(0)
      .is_aligned(kRowAlignment)
      .is_on_device_of(kv);
  params.kv_norm_weight = norm_weight_tensor.data_ptr();
  params.kv_norm_weight_is_float32 = norm_weight.dtype() == ScalarType::Float;
  params.eps = static_cast<float>(eps);
  add_positions(params, kKvNormInsert, kv, slot_mapping, position_ids, cos_sin_cache);
  add_packed_cache(params, kKvNormInsert, kv, k_cache, cache_block_size, /*kv_mxfp8=*/false);
  return params;
}

FusedInsertParams prepare_full_cache_bf16(const Tensor& q_tensor, const Tensor& kv_tensor,
                                          const Tensor& k_cache_tensor, const Tensor& slot_mapping,
                                          const Tensor& position_ids, const Tensor& cos_sin_cache,
                                          double eps, int64_t cache_block_size, bool apply_q_norm) {
  FusedInsertParams params;
  const Argument kv = add_kv(params, kFullCacheBf16, kv_tensor);
  const Argument q(kFullCacheBf16, "q", q_tensor);
  add_query(params, q, kv, eps, apply_q_norm, /*apply_q_rope=*/true, /*is_interleaved=*/false);
  q.has_no_overlap();
  params.q_out = params.q_in;
  params.num_heads_padded = params.num_heads;
  params.query_output = QueryOutput::kFloat16;
  add_positions(params, kFullCacheBf16, kv, slot_mapping, position_ids, cos_sin_cache);
  const Argument k_cache(kFullCacheBf16, "k_cache", k_cache_tensor);
  add_float16_cache_dtype(kv, k_cache);
  add_full_cache(params, kFullCacheBf16, kv, k_cache, cache_block_size);
  check_work(params, kFullCacheBf16);
  return params;
}

FusedInsertParams prepare_full_cache_fp8(const Tensor& q_tensor, const Tensor& kv_tensor,
                                         const Tensor& q_fp8_tensor, const Tensor& k_cache_tensor,
                                         const Tensor& slot_mapping, const Tensor& position_ids,
                                         const Tensor& cos_sin_cache, const Tensor& fp8_scale,
                                         const Tensor& q_fp8_scale_inv, double eps,
                                         int64_t cache_block_size, bool apply_q_norm) {
  FusedInsertParams params;
  const Argument kv = add_kv(params, kFullCacheFp8, kv_tensor);
  const Argument q(kFullCacheFp8, "q", q_tensor);
  add_query(params, q, kv, eps, apply_q_norm, /*apply_q_rope=*/true, /*is_interleaved=*/false);
  const Argument q_fp8(kFullCacheFp8, "q_fp8", q_fp8_tensor);
  q_fp8.has_dtype({ScalarType::Float8_e4m3fn});
  params.q_out = query_rows(q_fp8, kv, Dim("N", kv.size(0), "kv.size(0)"),
                            Dim("H", q.size(1), "q.size(1)"), /*is_interleaved=*/false);
  q_fp8.has_no_overlap();
  params.num_heads_padded = params.num_heads;
  params.query_output = QueryOutput::kE4M3;
  add_positions(params, kFullCacheFp8, kv, slot_mapping, position_ids, cos_sin_cache);
  const Argument k_cache(kFullCacheFp8, "k_cache", k_cache_tensor);
  k_cache.has_dtype({ScalarType::Float8_e4m3fn});
  add_full_cache(params, kFullCacheFp8, kv, k_cache, cache_block_size);
  params.kv_scale = scale_pointer(kFullCacheFp8, "fp8_scale", kv, fp8_scale);
  params.q_scale = scale_pointer(kFullCacheFp8, "q_fp8_scale_inv", kv, q_fp8_scale_inv);
  check_work(params, kFullCacheFp8);
  return params;
}

// `tensor` is any of the arguments: they are on one device.
void run(const FusedInsertParams& params, const char* op, const Tensor& tensor) {
  // On the CPU the caller does the work.
  if (params.num_tokens == 0 || !tensor.is_cuda()) return;
  const int32_t device_index = tensor.get_device_index();
  const stable_common::CurrentDevice current(device_index);
  stable_common::DeviceProperties device;
  STABLE_CUDA_CHECK(stable_common::get_device_properties(device_index, &device));
  check(device.compute_capability >= 80, op,
        "needs a device of compute capability 8.0 or later, got ", device.compute_capability / 10,
        ".", device.compute_capability % 10);
  STABLE_CUDA_CHECK(launch_fused_insert(params, choose_tuning(params, device), device,
                                        stable_common::current_stream(device_index)));
}

// The result of `op`: [num_tokens, num_heads, 512] like `q`, not initialised.
Tensor allocate_rows(const char* op, int64_t num_tokens, int64_t num_heads, const Argument& q) {
  const int64_t sizes[] = {num_tokens, num_heads, kHeadDim};
  // Of a contiguous tensor, as torch counts them where a size is zero.
  const int64_t strides[] = {std::max<int64_t>(num_heads, 1) * kHeadDim, kHeadDim, 1};
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.tensor().get(), &dtype));
  constexpr double kBytesPerGiB = 1 << 30;
  return stable_common::allocate_tensor(
      op, 3, sizes, strides, dtype, q.device(), "the result, [", num_tokens, ", ", num_heads, ", ",
      kHeadDim, "] ", stable_common::dtype_name(q.dtype()), " (",
      static_cast<double>(num_tokens) * num_heads * kHeadDim * 2 / kBytesPerGiB, " GiB) on ",
      q.device(), "; the .out overload writes to memory of the caller's");
}

}  // namespace

Tensor fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
    const Tensor& q_in, const Tensor& kv, Tensor k_cache, const Tensor& slot_mapping,
    const Tensor& position_ids, const Tensor& cos_sin_cache, int64_t q_head_padded, double eps,
    int64_t cache_block_size, bool apply_q_norm, bool kv_mxfp8, bool apply_q_rope,
    bool is_q_interleaved) {
  FusedInsertParams params = prepare_quant_insert(
      {q_in, kv, k_cache, slot_mapping, position_ids, cos_sin_cache, q_head_padded, eps,
       cache_block_size, apply_q_norm, kv_mxfp8, apply_q_rope, is_q_interleaved});
  Tensor q_out = allocate_rows(kQuantInsert, params.num_tokens, params.num_heads_padded,
                               Argument(kQuantInsert, "q_in", q_in));
  params.q_out = contiguous_rows(q_out.data_ptr(), params.num_heads_padded, is_q_interleaved);
  run(params, kQuantInsert, kv);
  return q_out;
}

void fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert_out(
    const Tensor& q_in, const Tensor& kv, Tensor k_cache, const Tensor& slot_mapping,
    const Tensor& position_ids, const Tensor& cos_sin_cache, int64_t q_head_padded, double eps,
    int64_t cache_block_size, bool apply_q_norm, bool kv_mxfp8, bool apply_q_rope,
    bool is_q_interleaved, Tensor q_out) {
  run(prepare_quant_insert_out(
          {q_in, kv, k_cache, slot_mapping, position_ids, cos_sin_cache, q_head_padded, eps,
           cache_block_size, apply_q_norm, kv_mxfp8, apply_q_rope, is_q_interleaved},
          q_out),
      kQuantInsert, kv);
}

void fused_deepseek_v4_kv_rope_insert(const Tensor& kv, Tensor k_cache, const Tensor& slot_mapping,
                                      const Tensor& position_ids, const Tensor& cos_sin_cache,
                                      int64_t cache_block_size, std::optional<Tensor> fp8_scale,
                                      bool kv_mxfp8) {
  run(prepare_kv_rope_insert(kv, k_cache, slot_mapping, position_ids, cos_sin_cache,
                             cache_block_size, fp8_scale, kv_mxfp8),
      kKvRopeInsert, kv);
}

void fused_deepseek_v4_kv_norm_rope_quant_insert(const Tensor& kv, const Tensor& norm_weight,
                                                 Tensor k_cache, const Tensor& slot_mapping,
                                                 const Tensor& position_ids,
                                                 const Tensor& cos_sin_cache, double eps,
                                                 int64_t cache_block_size) {
  run(prepare_kv_norm_insert(kv, norm_weight, k_cache, slot_mapping, position_ids, cos_sin_cache,
                             eps, cache_block_size),
      kKvNormInsert, kv);
}

void fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(
    Tensor q, const Tensor& kv, Tensor k_cache, const Tensor& slot_mapping,
    const Tensor& position_ids, const Tensor& cos_sin_cache, double eps, int64_t cache_block_size,
    bool apply_q_norm) {
  run(prepare_full_cache_bf16(q, kv, k_cache, slot_mapping, position_ids, cos_sin_cache, eps,
                              cache_block_size, apply_q_norm),
      kFullCacheBf16, kv);
}

void fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(
    const Tensor& q, const Tensor& kv, Tensor q_fp8, Tensor k_cache, const Tensor& slot_mapping,
    const Tensor& position_ids, const Tensor& cos_sin_cache, const Tensor& fp8_scale,
    const Tensor& q_fp8_scale_inv, double eps, int64_t cache_block_size, bool apply_q_norm) {
  run(prepare_full_cache_fp8(q, kv, q_fp8, k_cache, slot_mapping, position_ids, cos_sin_cache,
                             fp8_scale, q_fp8_scale_inv, eps, cache_block_size, apply_q_norm),
      kFullCacheFp8, kv);
}

}  // namespace deepseek_mla
