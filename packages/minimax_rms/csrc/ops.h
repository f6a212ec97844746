// The operators, as bindings.cpp registers them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace minimax_rms {

using torch::stable::Tensor;

Tensor minimax_allreduce_rms(const Tensor& input, const Tensor& norm_weight,
                             const Tensor& workspace, int64_t rank, int64_t nranks, double eps);
std::tuple<Tensor, Tensor> minimax_allreduce_rms_qk(const Tensor& qkv, const Tensor& norm_weight_q,
                                                    const Tensor& norm_weight_k,
                                                    const Tensor& workspace, int64_t q_size,
                                                    int64_t kv_size, int64_t rank, int64_t nranks,
                                                    double eps);

// The checks alone, on any device.
void check_minimax_allreduce_rms(const Tensor& input, const Tensor& norm_weight,
                                 const Tensor& workspace, int64_t rank, int64_t nranks, double eps);
void check_minimax_allreduce_rms_qk(const Tensor& qkv, const Tensor& norm_weight_q,
                                    const Tensor& norm_weight_k, const Tensor& workspace,
                                    int64_t q_size, int64_t kv_size, int64_t rank, int64_t nranks,
                                    double eps);

// With a tuning of the caller's.
std::tuple<Tensor, Tensor> minimax_allreduce_rms_qk_as(
    const Tensor& qkv, const Tensor& norm_weight_q, const Tensor& norm_weight_k,
    const Tensor& workspace, int64_t q_size, int64_t kv_size, int64_t rank, int64_t nranks,
    double eps, int64_t warps_per_token, int64_t num_blocks, int64_t threads_per_block);
std::vector<int64_t> choose_tuning_of(int64_t row_bytes, int64_t nranks, int64_t num_tokens,
                                      int64_t num_multiprocessors, bool shares_gpu);

int64_t comm_size_of(int64_t nranks, int64_t max_tokens);
int64_t max_tokens_of(int64_t nranks, int64_t comm_size);
int64_t descriptor_of(int64_t num_tokens, int64_t q_row_bytes, int64_t k_row_bytes,
                      int64_t element_type, double eps, bool has_k);
std::vector<int64_t> places_of(int64_t nranks, int64_t comm_size, int64_t num_tokens);

std::tuple<int64_t, Tensor> allocate(int64_t num_bytes);
int64_t open(const Tensor& handle);
void free(int64_t address);

void register_workspace(const Tensor& workspace, int64_t rank, int64_t nranks, int64_t max_tokens,
                        int64_t num_multiprocessors, double timeout, bool shares_gpu);
void set_timeout(const Tensor& workspace, double seconds);
int64_t large_calls();
void use_large_calls(int64_t address);
void check_calls(const Tensor& workspace);
void check_unraised(const Tensor& workspace);
std::vector<int64_t> missing_ranks(const Tensor& workspace);
void forget(const Tensor& workspace);

void announce_close(std::vector<int64_t> buffers, int64_t rank);

}  // namespace minimax_rms
