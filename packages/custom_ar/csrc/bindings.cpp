// Schemas, and the functions that serve them.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(custom_ar, m) {
  m.def(
      "init_custom_ar(int[] ipc_tensors, Tensor rank_data, int rank, bool fully_connected) -> int");
  m.def(
      "all_reduce(int fa, Tensor inp, Tensor(a!) out, int reg_buffer, int reg_buffer_sz_bytes) -> "
      "()");
  m.def("dispose(int fa) -> ()");
  m.def("meta_size() -> int");
  m.def("register_buffer(int fa, int[] ipc_tensors) -> ()");
  m.def("get_graph_buffer_ipc_meta(int fa) -> (int[], int[])");
  m.def("register_graph_buffers(int fa, int[][] handles, int[][] offsets) -> ()");
  m.def("allocate_shared_buffer_and_handle(int size) -> (int, Tensor)");
  m.def("open_mem_handle(Tensor mem_handle) -> int");
  m.def("free_shared_buffer(int ptr) -> ()");

  m.def("_try_all_reduce(int fa, Tensor inp, Tensor(a!) out, int max_size) -> bool");
  m.def("_try_all_reduce_new(int fa, Tensor inp, int max_size) -> Tensor?");
  m.def("_buffer_size(int world_size, int max_size) -> int");
  m.def("_set_timeout(int fa, float seconds) -> ()");
  m.def("_set_max_blocks(int fa, int max_blocks) -> ()");
  m.def("_keep_mappings(int fa) -> ()");
  m.def("_large_calls() -> int");
  m.def("_use_large_calls(int address) -> ()");
  m.def("_check(int fa) -> ()");
  m.def("_check_unraised(int fa) -> ()");
  m.def("_missing_ranks(int fa) -> int[]");
  m.def("_announce_close(int fa) -> ()");
  m.def(
      "_all_reduce_as(int fa, Tensor inp, Tensor(a!) out, int algorithm, int num_blocks, "
      "int threads_per_block, int depth) -> ()");
  m.def("_choose_tuning(int world_size, int num_bytes) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(custom_ar, CUDA, m) {
  m.impl("init_custom_ar", TORCH_BOX(&custom_ar::init_custom_ar));
  m.impl("all_reduce", TORCH_BOX(&custom_ar::all_reduce));
  m.impl("_all_reduce_as", TORCH_BOX(&custom_ar::all_reduce_as));
}

STABLE_TORCH_LIBRARY_IMPL(custom_ar, CompositeExplicitAutograd, m) {
  m.impl("dispose", TORCH_BOX(&custom_ar::dispose));
  m.impl("meta_size", TORCH_BOX(&custom_ar::meta_size));
  m.impl("register_buffer", TORCH_BOX(&custom_ar::register_buffer));
  m.impl("get_graph_buffer_ipc_meta", TORCH_BOX(&custom_ar::get_graph_buffer_ipc_meta));
  m.impl("register_graph_buffers", TORCH_BOX(&custom_ar::register_graph_buffers));
  m.impl("allocate_shared_buffer_and_handle",
         TORCH_BOX(&custom_ar::allocate_shared_buffer_and_handle));
  // Of a tensor on any device: it checks that it is on the CPU.
  m.impl("open_mem_handle", TORCH_BOX(&custom_ar::open_mem_handle));
  m.impl("free_shared_buffer", TORCH_BOX(&custom_ar::free_shared_buffer));
  // Of tensors on any device: those on others they do not take.
  m.impl("_try_all_reduce", TORCH_BOX(&custom_ar::try_all_reduce));
  m.impl("_try_all_reduce_new", TORCH_BOX(&custom_ar::try_all_reduce_new));
  m.impl("_buffer_size", TORCH_BOX(&custom_ar::buffer_size));
  m.impl("_set_timeout", TORCH_BOX(&custom_ar::set_timeout));
  m.impl("_set_max_blocks", TORCH_BOX(&custom_ar::set_max_blocks));
  m.impl("_keep_mappings", TORCH_BOX(&custom_ar::keep_mappings));
  m.impl("_large_calls", TORCH_BOX(&custom_ar::large_calls));
  m.impl("_use_large_calls", TORCH_BOX(&custom_ar::use_large_calls));
  m.impl("_check", TORCH_BOX(&custom_ar::check_calls));
  m.impl("_check_unraised", TORCH_BOX(&custom_ar::check_unraised));
  m.impl("_missing_ranks", TORCH_BOX(&custom_ar::missing_ranks));
  m.impl("_announce_close", TORCH_BOX(&custom_ar::announce_close));
  m.impl("_choose_tuning", TORCH_BOX(&custom_ar::choose_tuning_of));
}
