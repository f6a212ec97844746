// The ops on torch's stable tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace custom_ar {

using torch::stable::Tensor;

// vLLM's.
int64_t init_custom_ar(std::vector<int64_t> ipc_tensors, const Tensor& rank_data, int64_t rank,
                       bool fully_connected);
void all_reduce(int64_t fa, const Tensor& inp, Tensor out, int64_t reg_buffer,
                int64_t reg_buffer_sz_bytes);
void dispose(int64_t fa);
int64_t meta_size();
void register_buffer(int64_t fa, std::vector<int64_t> ipc_tensors);
std::tuple<std::vector<int64_t>, std::vector<int64_t>> get_graph_buffer_ipc_meta(int64_t fa);
void register_graph_buffers(int64_t fa, std::vector<std::vector<int64_t>> handles,
                            std::vector<std::vector<int64_t>> offsets);
std::tuple<int64_t, Tensor> allocate_shared_buffer_and_handle(int64_t size);
int64_t open_mem_handle(const Tensor& mem_handle);
void free_shared_buffer(int64_t ptr);

// For the communicator in Python, for tests and for tuning.
//
// The two that try answer false or nothing, and do nothing, where the kernels do not take `inp` or
// it has more than `max_size` bytes.
bool try_all_reduce(int64_t fa, const Tensor& inp, Tensor out, int64_t max_size);
std::optional<Tensor> try_all_reduce_new(int64_t fa, const Tensor& inp, int64_t max_size);
int64_t buffer_size(int64_t world_size, int64_t max_size);
void set_timeout(int64_t fa, double seconds);
void set_max_blocks(int64_t fa, int64_t max_blocks);
void keep_mappings(int64_t fa);
int64_t large_calls();
void use_large_calls(int64_t address);
void check_calls(int64_t fa);
void check_unraised(int64_t fa);
std::vector<int64_t> missing_ranks(int64_t fa);
void announce_close(int64_t fa);
void all_reduce_as(int64_t fa, const Tensor& inp, Tensor out, int64_t algorithm, int64_t num_blocks,
                   int64_t threads_per_block, int64_t depth);
std::vector<int64_t> choose_tuning_of(int64_t world_size, int64_t num_bytes);

}  // namespace custom_ar
