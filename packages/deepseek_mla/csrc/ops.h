// The ops on torch's stable tensors: they validate, allocate and launch. Given CPU tensors they
// validate and allocate only: the CPU implementations are in Python, and call these first so that
// an error reads the same on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace deepseek_mla {

using torch::stable::Tensor;

Tensor fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
    const Tensor& q_in, const Tensor& kv, Tensor k_cache, const Tensor& slot_mapping,
    const Tensor& position_ids, const Tensor& cos_sin_cache, int64_t q_head_padded, double eps,
    int64_t cache_block_size, bool apply_q_norm, bool kv_mxfp8, bool apply_q_rope,
    bool is_q_interleaved);

void fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert_out(
    const Tensor& q_in, const Tensor& kv, Tensor k_cache, const Tensor& slot_mapping,
    const Tensor& position_ids, const Tensor& cos_sin_cache, int64_t q_head_padded, double eps,
    int64_t cache_block_size, bool apply_q_norm, bool kv_mxfp8, bool apply_q_rope,
    bool is_q_interleaved, Tensor q_out);

void fused_deepseek_v4_kv_rope_insert(const Tensor& kv, Tensor k_cache, const Tensor& slot_mapping,
                                      const Tensor& position_ids, const Tensor& cos_sin_cache,
                                      int64_t cache_block_size, std::optional<Tensor> fp8_scale,
                                      bool kv_mxfp8);

void fused_deepseek_v4_kv_norm_rope_quant_insert(const Tensor& kv, const Tensor& norm_weight,
                                                 Tensor k_cache, const Tensor& slot_mapping,
                                                 const Tensor& position_ids,
                                                 const Tensor& cos_sin_cache, double eps,
                                                 int64_t cache_block_size);

void fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(
    Tensor q, const Tensor& kv, Tensor k_cache, const Tensor& slot_mapping,
    const Tensor& position_ids, const Tensor& cos_sin_cache, double eps, int64_t cache_block_size,
    bool apply_q_norm);

void fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(
    const Tensor& q, const Tensor& kv, Tensor q_fp8, Tensor k_cache, const Tensor& slot_mapping,
    const Tensor& position_ids, const Tensor& cos_sin_cache, const Tensor& fp8_scale,
    const Tensor& q_fp8_scale_inv, double eps, int64_t cache_block_size, bool apply_q_norm);

}  // namespace deepseek_mla
