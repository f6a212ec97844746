// Schemas, and the functions that serve them on CUDA. The CPU implementations are registered from
// Python; the _check ops are what they call to validate (the first returns the tensor to fill).
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(deepseek_mla, m) {
  m.def(
      "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(Tensor q_in, Tensor kv, "
      "Tensor(a!) k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, "
      "int q_head_padded, float eps, int cache_block_size, bool apply_q_norm=True, "
      "bool kv_mxfp8=False, bool apply_q_rope=True, bool is_q_interleaved=False) -> Tensor");
  m.def(
      "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out(Tensor q_in, Tensor kv, "
      "Tensor(a!) k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, "
      "int q_head_padded, float eps, int cache_block_size, bool apply_q_norm=True, "
      "bool kv_mxfp8=False, bool apply_q_rope=True, bool is_q_interleaved=False, *, "
      "Tensor(b!) q_out) -> ()");
  m.def(
      "fused_deepseek_v4_kv_rope_insert(Tensor kv, Tensor(a!) k_cache, Tensor slot_mapping, "
      "Tensor position_ids, Tensor cos_sin_cache, int cache_block_size, Tensor? fp8_scale=None, "
      "bool kv_mxfp8=False) -> ()");
  m.def(
      "fused_deepseek_v4_kv_norm_rope_quant_insert(Tensor kv, Tensor norm_weight, "
      "Tensor(a!) k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, "
      "float eps, int cache_block_size) -> ()");
  m.def(
      "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(Tensor(a!) q, Tensor kv, "
      "Tensor(b!) k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, "
      "float eps, int cache_block_size, bool apply_q_norm=True) -> ()");
  m.def(
      "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(Tensor q, Tensor kv, "
      "Tensor(a!) q_fp8, Tensor(b!) k_cache, Tensor slot_mapping, Tensor position_ids, "
      "Tensor cos_sin_cache, Tensor fp8_scale, Tensor q_fp8_scale_inv, float eps, "
      "int cache_block_size, bool apply_q_norm=True) -> ()");

  m.def(
      "_check_fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(Tensor q_in, Tensor kv, "
      "Tensor k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, "
      "int q_head_padded, float eps, int cache_block_size, bool apply_q_norm, bool kv_mxfp8, "
      "bool apply_q_rope, bool is_q_interleaved) -> Tensor");
  m.def(
      "_check_fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert_out(Tensor q_in, Tensor kv, "
      "Tensor k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, "
      "int q_head_padded, float eps, int cache_block_size, bool apply_q_norm, bool kv_mxfp8, "
      "bool apply_q_rope, bool is_q_interleaved, Tensor q_out) -> ()");
  m.def(
      "_check_fused_deepseek_v4_kv_rope_insert(Tensor kv, Tensor k_cache, Tensor slot_mapping, "
      "Tensor position_ids, Tensor cos_sin_cache, int cache_block_size, Tensor? fp8_scale, "
      "bool kv_mxfp8) -> ()");
  m.def(
      "_check_fused_deepseek_v4_kv_norm_rope_quant_insert(Tensor kv, Tensor norm_weight, "
      "Tensor k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, "
      "float eps, int cache_block_size) -> ()");
  m.def(
      "_check_fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(Tensor q, Tensor kv, "
      "Tensor k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, "
      "float eps, int cache_block_size, bool apply_q_norm) -> ()");
  m.def(
      "_check_fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(Tensor q, Tensor kv, "
      "Tensor q_fp8, Tensor k_cache, Tensor slot_mapping, Tensor position_ids, "
      "Tensor cos_sin_cache, Tensor fp8_scale, Tensor q_fp8_scale_inv, float eps, "
      "int cache_block_size, bool apply_q_norm) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(deepseek_mla, CUDA, m) {
  using namespace deepseek_mla;
  m.impl("fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert",
         TORCH_BOX(&fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert));
  m.impl("fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out",
         TORCH_BOX(&fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert_out));
  m.impl("fused_deepseek_v4_kv_rope_insert", TORCH_BOX(&fused_deepseek_v4_kv_rope_insert));
  m.impl("fused_deepseek_v4_kv_norm_rope_quant_insert",
         TORCH_BOX(&fused_deepseek_v4_kv_norm_rope_quant_insert));
  m.impl("fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert",
         TORCH_BOX(&fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert));
  m.impl("fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert",
         TORCH_BOX(&fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert));
}

STABLE_TORCH_LIBRARY_IMPL(deepseek_mla, CPU, m) {
  using namespace deepseek_mla;
  m.impl("_check_fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert",
         TORCH_BOX(&fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert));
  m.impl("_check_fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert_out",
         TORCH_BOX(&fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert_out));
  m.impl("_check_fused_deepseek_v4_kv_rope_insert", TORCH_BOX(&fused_deepseek_v4_kv_rope_insert));
  m.impl("_check_fused_deepseek_v4_kv_norm_rope_quant_insert",
         TORCH_BOX(&fused_deepseek_v4_kv_norm_rope_quant_insert));
  m.impl("_check_fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert",
         TORCH_BOX(&fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert));
  m.impl("_check_fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert",
         TORCH_BOX(&fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert));
}
