// Schemas, and the functions that serve them on CUDA.
//
// The CPU implementations are registered from Python. For each op there is a _check op of the same
// arguments, served on the CPU by the op's function, which validates there and does not compute:
// what the implementations in Python call first. Where an op returns a tensor, its check returns
// that tensor, yet to be filled.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>

#include "ops.h"

namespace {

struct Op {
  std::string name;
  std::string arguments;
  std::string returns;
  void (*function)(StableIValue*, uint64_t, uint64_t);
};

const std::string kQuantInsertArguments =
    "Tensor q_in, Tensor kv, Tensor(a!) k_cache, Tensor slot_mapping, Tensor position_ids, "
    "Tensor cos_sin_cache, int q_head_padded, float eps, int cache_block_size, "
    "bool apply_q_norm=True, bool kv_mxfp8=False, bool apply_q_rope=True, "
    "bool is_q_interleaved=False";

const Op kOps[] = {
    {"fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert", kQuantInsertArguments, "Tensor",
     TORCH_BOX(&deepseek_mla::fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert)},
    {"fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out",
     kQuantInsertArguments + ", *, Tensor(b!) q_out", "()",
     TORCH_BOX(&deepseek_mla::fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert_out)},
    {"fused_deepseek_v4_kv_rope_insert",
     "Tensor kv, Tensor(a!) k_cache, Tensor slot_mapping, Tensor position_ids, "
     "Tensor cos_sin_cache, int cache_block_size, Tensor? fp8_scale=None, bool kv_mxfp8=False",
     "()", TORCH_BOX(&deepseek_mla::fused_deepseek_v4_kv_rope_insert)},
    {"fused_deepseek_v4_kv_norm_rope_quant_insert",
     "Tensor kv, Tensor norm_weight, Tensor(a!) k_cache, Tensor slot_mapping, "
     "Tensor position_ids, Tensor cos_sin_cache, float eps, int cache_block_size",
     "()", TORCH_BOX(&deepseek_mla::fused_deepseek_v4_kv_norm_rope_quant_insert)},
    {"fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert",
     "Tensor(a!) q, Tensor kv, Tensor(b!) k_cache, Tensor slot_mapping, Tensor position_ids, "
     "Tensor cos_sin_cache, float eps, int cache_block_size, bool apply_q_norm=True",
     "()", TORCH_BOX(&deepseek_mla::fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert)},
    {"fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert",
     "Tensor q, Tensor kv, Tensor(a!) q_fp8, Tensor(b!) k_cache, Tensor slot_mapping, "
     "Tensor position_ids, Tensor cos_sin_cache, Tensor fp8_scale, Tensor q_fp8_scale_inv, "
     "float eps, int cache_block_size, bool apply_q_norm=True",
     "()", TORCH_BOX(&deepseek_mla::fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert)},
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(deepseek_mla, m) {
  for (const Op& op : kOps) {
    m.def((op.name + "(" + op.arguments + ") -> " + op.returns).c_str());
    m.def(("_check_" + op.name + "(" + op.arguments + ") -> " + op.returns).c_str());
  }
}

STABLE_TORCH_LIBRARY_IMPL(deepseek_mla, CUDA, m) {
  for (const Op& op : kOps) m.impl(op.name.c_str(), op.function);
}

STABLE_TORCH_LIBRARY_IMPL(deepseek_mla, CPU, m) {
  for (const Op& op : kOps) m.impl(("_check_" + op.name).c_str(), op.function);
}
