// Schemas, and the functions that serve them.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(minimax_rms, m) {
  m.def(
      "minimax_allreduce_rms(Tensor input, Tensor norm_weight, Tensor(a!) workspace, int rank, "
      "int nranks, float eps) -> Tensor");
  m.def(
      "minimax_allreduce_rms_qk(Tensor qkv, Tensor norm_weight_q, Tensor norm_weight_k, "
      "Tensor(a!) workspace, int q_size, int kv_size, int rank, int nranks, float eps) -> "
      "(Tensor, Tensor)");

  m.def(
      "_check_minimax_allreduce_rms(Tensor input, Tensor norm_weight, Tensor workspace, int rank, "
      "int nranks, float eps) -> ()");
  m.def(
      "_check_minimax_allreduce_rms_qk(Tensor qkv, Tensor norm_weight_q, Tensor norm_weight_k, "
      "Tensor workspace, int q_size, int kv_size, int rank, int nranks, float eps) -> ()");
  m.def(
      "_minimax_allreduce_rms_qk_as(Tensor qkv, Tensor norm_weight_q, Tensor norm_weight_k, "
      "Tensor(a!) workspace, int q_size, int kv_size, int rank, int nranks, float eps, "
      "int warps_per_token, int num_blocks, int threads_per_block) -> (Tensor, Tensor)");
  m.def(
      "_choose_tuning(int row_bytes, int nranks, int num_tokens, int num_multiprocessors, "
      "bool shares_gpu=False) -> int[]");
  m.def("_comm_size(int nranks, int max_tokens) -> int");
  m.def("_max_tokens(int nranks, int comm_size) -> int");
  m.def(
      "_descriptor(int num_tokens, int q_row_bytes, int k_row_bytes, int element_type, float eps, "
      "bool has_k) -> int");
  m.def("_places(int nranks, int comm_size, int num_tokens) -> int[]");
  m.def("_allocate(int num_bytes) -> (int, Tensor)");
  m.def("_open(Tensor handle) -> int");
  m.def("_free(int address) -> ()");
  m.def(
      "_register(Tensor workspace, int rank, int nranks, int max_tokens, int "
      "num_multiprocessors, float timeout, bool shares_gpu=False) -> ()");
  m.def("_set_timeout(Tensor workspace, float seconds) -> ()");
  m.def("_large_calls() -> int");
  m.def("_use_large_calls(int address) -> ()");
  m.def("_check(Tensor workspace) -> ()");
  m.def("_check_unraised(Tensor workspace) -> ()");
  m.def("_missing_ranks(Tensor workspace) -> int[]");
  m.def("_forget(Tensor workspace) -> ()");
  m.def("_announce_close(int[] buffers, int rank) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(minimax_rms, CUDA, m) {
  m.impl("minimax_allreduce_rms", TORCH_BOX(&minimax_rms::minimax_allreduce_rms));
  m.impl("minimax_allreduce_rms_qk", TORCH_BOX(&minimax_rms::minimax_allreduce_rms_qk));
  m.impl("_minimax_allreduce_rms_qk_as", TORCH_BOX(&minimax_rms::minimax_allreduce_rms_qk_as));
}

STABLE_TORCH_LIBRARY_IMPL(minimax_rms, CompositeExplicitAutograd, m) {
  m.impl("_check_minimax_allreduce_rms", TORCH_BOX(&minimax_rms::check_minimax_allreduce_rms));
  m.impl("_check_minimax_allreduce_rms_qk",
         TORCH_BOX(&minimax_rms::check_minimax_allreduce_rms_qk));
  m.impl("_choose_tuning", TORCH_BOX(&minimax_rms::choose_tuning_of));
  m.impl("_comm_size", TORCH_BOX(&minimax_rms::comm_size_of));
  m.impl("_max_tokens", TORCH_BOX(&minimax_rms::max_tokens_of));
  m.impl("_descriptor", TORCH_BOX(&minimax_rms::descriptor_of));
  m.impl("_places", TORCH_BOX(&minimax_rms::places_of));
  m.impl("_allocate", TORCH_BOX(&minimax_rms::allocate));
  m.impl("_open", TORCH_BOX(&minimax_rms::open));
  m.impl("_free", TORCH_BOX(&minimax_rms::free));
  m.impl("_register", TORCH_BOX(&minimax_rms::register_workspace));
  m.impl("_set_timeout", TORCH_BOX(&minimax_rms::set_timeout));
  m.impl("_large_calls", TORCH_BOX(&minimax_rms::large_calls));
  m.impl("_use_large_calls", TORCH_BOX(&minimax_rms::use_large_calls));
  m.impl("_check", TORCH_BOX(&minimax_rms::check_calls));
  m.impl("_check_unraised", TORCH_BOX(&minimax_rms::check_unraised));
  m.impl("_missing_ranks", TORCH_BOX(&minimax_rms::missing_ranks));
  m.impl("_forget", TORCH_BOX(&minimax_rms::forget));
  m.impl("_announce_close", TORCH_BOX(&minimax_rms::announce_close));
}
