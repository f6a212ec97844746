#include "ops.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "rms_norm.h"
#include "stable_common/allocate.h"
#include "stable_common/cuda_check.h"
#include "stable_common/dtype.h"
#include "stable_common/large_calls.h"
#include "stable_common/peer_memory.h"
#include "stable_common/stream.h"
#include "stable_common/tensor_check.h"
#include "workspace.h"

namespace minimax_rms {

namespace {

using stable_common::Argument;
using stable_common::check;
using stable_common::current_device_index;
using stable_common::CurrentDevice;
using stable_common::element_bytes;
using stable_common::element_type_of;
using torch::headeronly::ScalarType;

constexpr char kOne[] = "minimax_rms::minimax_allreduce_rms";
constexpr char kQk[] = "minimax_rms::minimax_allreduce_rms_qk";
constexpr char kQkAs[] = "minimax_rms::_minimax_allreduce_rms_qk_as";

void check_ranks(const char* op, int64_t nranks) {
  check(nranks >= 1 && nranks <= kMaxRanks, op, "nranks must be in [1, ", kMaxRanks, "], got ",
        nranks);
}

void check_rank(const char* op, int64_t rank, int64_t nranks) {
  check_ranks(op, nranks);
  check(rank >= 0 && rank < nranks, op, "rank must be in [0, nranks) with nranks = ", nranks,
        ", got ", rank);
}

void check_multiprocessors(const char* op, int64_t num_multiprocessors) {
  constexpr int64_t kMax = 1 << 16;
  check(num_multiprocessors >= 1 && num_multiprocessors <= kMax, op,
        "num_multiprocessors must be in [1, ", kMax, "], got ", num_multiprocessors);
}

void check_tokens(const char* op, const char* name, int64_t tokens, int bits) {
  check(tokens > 0 && tokens < int64_t{1} << bits, op, name, " must be in [1, 2^", bits, "), got ",
        tokens);
}

void check_comm_size(const char* op, int64_t comm_size) {
  check(comm_size >= 0 && comm_size < int64_t{1} << 48, op, "comm_size must be in [0, 2^48), got ",
        comm_size);
}

const int64_t* check_workspace(const Argument& workspace, int64_t nranks) {
  workspace.has_dtype({ScalarType::Long});
  workspace.require(workspace.rank() == 1 && workspace.size(0) >= 3 * nranks + 2,
                    "must have shape [3 * nranks + 2] or more with nranks = ", nranks, ", got ",
                    workspace.shape());
  workspace.is_dense_from(0);
  return static_cast<const int64_t*>(workspace.tensor().data_ptr());
}

// What a call is about, once its arguments have passed all checks.
struct Call {
  const char* op;
  RmsNormParams params;  // lacks outputs, and what is the workspace's
  ElementType type;
  int32_t dtype;
  stable_common::Device device;
  const int64_t* workspace;
  int rank;
  int num_ranks;
};

int64_t check_width(const char* op, const char* name, int64_t width, int64_t element_size,
                    int64_t least) {
  check(width >= least && width < int64_t{1} << 31 && width * element_size % kVectorBytes == 0, op,
        name, " must be ", least > 0 ? "a positive" : "zero or a positive", " multiple of ",
        kVectorBytes / element_size, " elements (", kVectorBytes, " bytes) below 2^31, got ",
        width);
  return width * element_size / kVectorBytes;
}

Call check_call(const char* op, const Argument& input, const Argument& weight_q,
                const Argument* weight_k, const Argument& workspace, int64_t q_size,
                int64_t kv_size, int64_t rank, int64_t nranks, double eps) {
  const ElementType type = element_type_of(input);
  const int64_t element_size = element_bytes(type);
  Call call = {};
  call.op = op;
  call.type = type;
  if (weight_k != nullptr) {
    call.params.q_vectors = static_cast<int>(check_width(op, "q_size", q_size, element_size, 1));
    call.params.k_vectors = static_cast<int>(check_width(op, "kv_size", kv_size, element_size, 0));
    input.has_shape({"T", {"W", q_size + 2 * kv_size, "q_size + 2 * kv_size"}});
  } else {
    input.has_shape({"T", "D"});
    q_size = input.size(1);
    call.params.q_vectors =
        static_cast<int>(check_width(op, "D = input.size(1)", q_size, element_size, 1));
  }
  input.is_dense_from(1).is_aligned(kVectorBytes, 1);

  const auto check_weight = [&](const Argument& weight, const char* source, int64_t size) {
    weight.has_dtype_of(input).is_on_device_of(input);
    weight.has_shape({{"D", size, source}}).is_dense_from(0).is_aligned(kVectorBytes);
    return weight.tensor().data_ptr();
  };
  call.params.weight_q =
      check_weight(weight_q, weight_k != nullptr ? "q_size" : "input.size(1)", q_size);
  if (weight_k != nullptr) call.params.weight_k = check_weight(*weight_k, "kv_size", kv_size);

  check_rank(op, rank, nranks);
  check(eps >= 0 && std::isfinite(static_cast<float>(eps)), op,
        "eps must be finite in float32 and at least 0, got ", eps);
  call.params.num_tokens = input.size(0);
  const int token_bits = nranks > 1 ? kDescriptorTokenBits : kTokenBits;
  input.require(call.params.num_tokens < int64_t{1} << token_bits, "must have fewer than 2^",
                token_bits, " tokens", nranks > 1 ? " for several ranks" : "", ", got ",
                call.params.num_tokens);
  call.workspace = nullptr;
  if (nranks > 1) {
    workspace.is_on_device_of(input);
    call.workspace = check_workspace(workspace, nranks);
  }

  call.params.input = input.tensor().data_ptr();
  call.params.input_stride_bytes = input.stride_bytes(0);
  call.params.q_mean_factor = static_cast<float>(1.0 / static_cast<double>(q_size * nranks));
  call.params.k_mean_factor =
      kv_size > 0 ? static_cast<float>(1.0 / static_cast<double>(kv_size * nranks)) : 0.0f;
  call.params.eps = static_cast<float>(eps) + 0.0f;  // not -0
  if (nranks > 1) call.params.descriptor = make_descriptor(call.params, type, weight_k != nullptr);
  call.device = input.device();
  call.rank = static_cast<int>(rank);
  call.num_ranks = static_cast<int>(nranks);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.tensor().get(), &call.dtype));
  return call;
}

Call check_one(const char* op, const Tensor& input, const Tensor& norm_weight,
               const Tensor& workspace, int64_t rank, int64_t nranks, double eps) {
  return check_call(op, Argument(op, "input", input), Argument(op, "norm_weight", norm_weight),
                    nullptr, Argument(op, "workspace", workspace), 0, 0, rank, nranks, eps);
}

Call check_qk(const char* op, const Tensor& qkv, const Tensor& norm_weight_q,
              const Tensor& norm_weight_k, const Tensor& workspace, int64_t q_size, int64_t kv_size,
              int64_t rank, int64_t nranks, double eps) {
  const Argument weight_k(op, "norm_weight_k", norm_weight_k);
  return check_call(op, Argument(op, "qkv", qkv), Argument(op, "norm_weight_q", norm_weight_q),
                    &weight_k, Argument(op, "workspace", workspace), q_size, kv_size, rank, nranks,
                    eps);
}

// Not initialised.
Tensor allocate_rows(const Call& call, int64_t num_vectors) {
  const int64_t width = num_vectors * kVectorBytes / element_bytes(call.type);
  const int64_t sizes[] = {call.params.num_tokens, width};
  const int64_t strides[] = {width, 1};
  return stable_common::allocate_tensor(call.op, 2, sizes, strides, call.dtype, call.device,
                                        "a result of [", sizes[0], ", ", sizes[1], "] on ",
                                        call.device);
}

stable_common::DeviceProperties properties_of(const Call& call) {
  stable_common::DeviceProperties device;
  STABLE_CUDA_CHECK(stable_common::get_device_properties(call.device.index, &device));
  return device;
}

std::tuple<Tensor, Tensor> run(Call call, const RmsNormTuning* forced) {
  // Another argument's device may have brought the call here.
  check(call.device.is_cuda(), call.op, "input and weights must be on a CUDA device, got ",
        call.device);
  const CurrentDevice current(call.device.index);
  std::shared_ptr<Workspace> workspace;
  if (call.num_ranks > 1 && call.params.num_tokens > 0) {
    workspace = find_or_add_workspace(call.op, call.workspace, call.rank, call.num_ranks,
                                      call.device.index);
    workspace->check_capacity(call.op, call.params.num_tokens);
  }
  Tensor q = allocate_rows(call, call.params.q_vectors);
  Tensor k = call.params.k_vectors > 0 ? allocate_rows(call, call.params.k_vectors) : Tensor();
  if (call.params.num_tokens == 0) return {std::move(q), std::move(k)};
  call.params.output_q = q.data_ptr();
  call.params.output_k = call.params.k_vectors > 0 ? k.data_ptr() : nullptr;

  const stable_common::DeviceProperties device = properties_of(call);
  const RmsNormTuning tuning =
      forced != nullptr ? *forced
                        : choose_tuning(call.params.q_vectors + call.params.k_vectors,
                                        call.num_ranks, call.params.num_tokens,
                                        workspace != nullptr ? workspace->num_multiprocessors()
                                                             : device.num_multiprocessors,
                                        workspace != nullptr && workspace->shares_gpu());
  const cudaStream_t stream = stable_common::current_stream(call.device.index);
  if (workspace != nullptr) {
    workspace->launch(call.op, call.params, call.type, tuning, stream);
  } else {
    check(device.compute_capability >= 80, call.op,
          "needs a device of compute capability 8.0 or later, got ", device.compute_capability / 10,
          ".", device.compute_capability % 10);
    STABLE_CUDA_CHECK(launch_rms_norm(call.params, call.type, tuning, device, stream));
  }
  return {std::move(q), std::move(k)};
}

std::tuple<Tensor, Tensor> run_qk(const Call& call, const RmsNormTuning* forced) {
  std::tuple<Tensor, Tensor> result = run(call, forced);
  // Without k an empty tensor of its shape.
  if (call.params.k_vectors == 0) std::get<1>(result) = allocate_rows(call, 0);
  return result;
}

std::shared_ptr<Workspace> known_workspace(const char* op, const Tensor& workspace) {
  const Argument argument(op, "workspace", workspace);
  argument.has_dtype({ScalarType::Long});
  return find_workspace(static_cast<const int64_t*>(workspace.data_ptr()));
}

WorkspaceHeader* header_at(const char* op, const char* name, int64_t address) {
  check(address > 0 && address % static_cast<int64_t>(sizeof(uint64_t)) == 0, op, name,
        " must be the address of a communication buffer, got ", address);
  return reinterpret_cast<WorkspaceHeader*>(address);
}

}  // namespace

Tensor minimax_allreduce_rms(const Tensor& input, const Tensor& norm_weight,
                             const Tensor& workspace, int64_t rank, int64_t nranks, double eps) {
  return std::get<0>(
      run(check_one(kOne, input, norm_weight, workspace, rank, nranks, eps), nullptr));
}

std::tuple<Tensor, Tensor> minimax_allreduce_rms_qk(const Tensor& qkv, const Tensor& norm_weight_q,
                                                    const Tensor& norm_weight_k,
                                                    const Tensor& workspace, int64_t q_size,
                                                    int64_t kv_size, int64_t rank, int64_t nranks,
                                                    double eps) {
  return run_qk(check_qk(kQk, qkv, norm_weight_q, norm_weight_k, workspace, q_size, kv_size, rank,
                         nranks, eps),
                nullptr);
}

void check_minimax_allreduce_rms(const Tensor& input, const Tensor& norm_weight,
                                 const Tensor& workspace, int64_t rank, int64_t nranks,
                                 double eps) {
  check_one(kOne, input, norm_weight, workspace, rank, nranks, eps);
}

void check_minimax_allreduce_rms_qk(const Tensor& qkv, const Tensor& norm_weight_q,
                                    const Tensor& norm_weight_k, const Tensor& workspace,
                                    int64_t q_size, int64_t kv_size, int64_t rank, int64_t nranks,
                                    double eps) {
  check_qk(kQk, qkv, norm_weight_q, norm_weight_k, workspace, q_size, kv_size, rank, nranks, eps);
}

std::tuple<Tensor, Tensor> minimax_allreduce_rms_qk_as(
    const Tensor& qkv, const Tensor& norm_weight_q, const Tensor& norm_weight_k,
    const Tensor& workspace, int64_t q_size, int64_t kv_size, int64_t rank, int64_t nranks,
    double eps, int64_t warps_per_token, int64_t num_blocks, int64_t threads_per_block) {
  const Call call = check_qk(kQkAs, qkv, norm_weight_q, norm_weight_k, workspace, q_size, kv_size,
                             rank, nranks, eps);
  const bool is_team = warps_per_token == 2 || warps_per_token == 4 || warps_per_token == 8;
  check(is_team || warps_per_token == 1, kQkAs, "warps_per_token must be 1, 2, 4 or 8, got ",
        warps_per_token);
  check(num_blocks >= 1 && num_blocks < int64_t{1} << 31, kQkAs,
        "num_blocks must be in [1, 2^31), got ", num_blocks);
  const int64_t team = 32 * warps_per_token;
  const int64_t most = max_threads_of(static_cast<int>(warps_per_token));
  check(threads_per_block >= team && threads_per_block <= most && threads_per_block % team == 0,
        kQkAs, "threads_per_block must be a multiple of 32 * warps_per_token = ", team, " up to ",
        most, ", got ", threads_per_block);
  const RmsNormTuning tuning = {static_cast<int>(warps_per_token), static_cast<int>(num_blocks),
                                static_cast<int>(threads_per_block)};
  return run_qk(call, &tuning);
}

std::vector<int64_t> choose_tuning_of(int64_t row_bytes, int64_t nranks, int64_t num_tokens,
                                      int64_t num_multiprocessors, bool shares_gpu) {
  constexpr char kOp[] = "minimax_rms::_choose_tuning";
  check_ranks(kOp, nranks);
  check(row_bytes > 0 && row_bytes % kVectorBytes == 0, kOp, "row_bytes must be a positive ",
        "multiple of ", kVectorBytes, ", got ", row_bytes);
  check_tokens(kOp, "num_tokens", num_tokens, kTokenBits);
  check_multiprocessors(kOp, num_multiprocessors);
  const RmsNormTuning tuning =
      choose_tuning(row_bytes / kVectorBytes, static_cast<int>(nranks), num_tokens,
                    static_cast<int>(num_multiprocessors), shares_gpu);
  return {tuning.warps_per_token, tuning.num_blocks, tuning.threads_per_block};
}

int64_t comm_size_of(int64_t nranks, int64_t max_tokens) {
  constexpr char kOp[] = "minimax_rms::_comm_size";
  check_ranks(kOp, nranks);
  check_tokens(kOp, "max_tokens", max_tokens, kDescriptorTokenBits);
  return comm_size_for(static_cast<int>(nranks), max_tokens);
}

int64_t max_tokens_of(int64_t nranks, int64_t comm_size) {
  constexpr char kOp[] = "minimax_rms::_max_tokens";
  check_ranks(kOp, nranks);
  check_comm_size(kOp, comm_size);
  return std::min(capacity_of(static_cast<int>(nranks), comm_size),
                  (int64_t{1} << kDescriptorTokenBits) - 1);
}

int64_t descriptor_of(int64_t num_tokens, int64_t q_row_bytes, int64_t k_row_bytes,
                      int64_t element_type, double eps, bool has_k) {
  RmsNormParams params;
  params.num_tokens = num_tokens;
  params.q_vectors = static_cast<int>(q_row_bytes / kVectorBytes);
  params.k_vectors = static_cast<int>(k_row_bytes / kVectorBytes);
  params.eps = static_cast<float>(eps);
  return static_cast<int64_t>(
      make_descriptor(params, static_cast<ElementType>(element_type), has_k));
}

std::vector<int64_t> places_of(int64_t nranks, int64_t comm_size, int64_t num_tokens) {
  constexpr char kOp[] = "minimax_rms::_places";
  check_ranks(kOp, nranks);
  check_comm_size(kOp, comm_size);
  const int64_t capacity = capacity_of(static_cast<int>(nranks), comm_size);
  check(num_tokens >= 0 && num_tokens <= capacity, kOp, "num_tokens must be in [0, ", capacity,
        "], got ", num_tokens);
  const Places places(static_cast<int>(nranks), comm_size, num_tokens);
  std::vector<int64_t> all(num_tokens);
  for (int64_t token = 0; token < num_tokens; ++token) all[token] = places.of(token);
  return all;
}

std::tuple<int64_t, Tensor> allocate(int64_t num_bytes) {
  constexpr char kOp[] = "minimax_rms::_allocate";
  constexpr int64_t kWordBytes = sizeof(uint64_t);
  check(num_bytes > 0 && num_bytes % kWordBytes == 0, kOp, "num_bytes must be a positive multiple ",
        "of ", kWordBytes, ", got ", num_bytes);
  const CurrentDevice current(current_device_index());
  cudaIpcMemHandle_t handle = {};
  void* address =
      stable_common::allocate_shared(kOp, num_bytes, static_cast<uint32_t>(kEmptyWord), &handle);
  return {reinterpret_cast<int64_t>(address), stable_common::handle_tensor(handle)};
}

int64_t open(const Tensor& handle) {
  const cudaIpcMemHandle_t value =
      stable_common::tensor_handle(Argument("minimax_rms::_open", "handle", handle));
  const CurrentDevice current(current_device_index());
  return reinterpret_cast<int64_t>(stable_common::open_shared(value));
}

void free(int64_t address) {
  stable_common::free_shared("minimax_rms::_free", "address", "_allocate or _open",
                             reinterpret_cast<void*>(address));
}

void register_workspace(const Tensor& workspace, int64_t rank, int64_t nranks, int64_t max_tokens,
                        int64_t num_multiprocessors, double timeout, bool shares_gpu) {
  constexpr char kOp[] = "minimax_rms::_register";
  check_rank(kOp, rank, nranks);
  const Argument argument(kOp, "workspace", workspace);
  argument.require(argument.device().is_cuda(), "must be on a CUDA device, got ",
                   argument.device());
  const int64_t* address = check_workspace(argument, nranks);
  check(max_tokens > 0, kOp, "max_tokens must be positive, got ", max_tokens);
  check_multiprocessors(kOp, num_multiprocessors);
  stable_common::check_timeout(kOp, timeout);
  const CurrentDevice current(argument.device().index);
  forget_workspace(address);
  const auto added = find_or_add_workspace(kOp, address, static_cast<int>(rank),
                                           static_cast<int>(nranks), argument.device().index);
  added->set_limits(max_tokens, static_cast<int>(num_multiprocessors), shares_gpu);
  added->set_timeout(timeout);
  if (nranks > 1) added->order_large_calls();
}

int64_t large_calls() { return reinterpret_cast<int64_t>(&stable_common::LargeCalls::instance()); }

void use_large_calls(int64_t address) {
  check(address != 0, "minimax_rms::_use_large_calls",
        "address must be what _large_calls returned, got 0");
  stable_common::LargeCalls::use(reinterpret_cast<stable_common::LargeCalls*>(address));
}

void set_timeout(const Tensor& workspace, double seconds) {
  constexpr char kOp[] = "minimax_rms::_set_timeout";
  stable_common::check_timeout(kOp, seconds);
  const auto found = known_workspace(kOp, workspace);
  check(found != nullptr, kOp, "workspace must be registered");
  found->set_timeout(seconds);
}

void check_calls(const Tensor& workspace) {
  constexpr char kOp[] = "minimax_rms::check";
  const auto found = known_workspace(kOp, workspace);
  if (found != nullptr) found->check_calls(kOp);
}

void check_unraised(const Tensor& workspace) {
  constexpr char kOp[] = "minimax_rms::check";
  const auto found = known_workspace(kOp, workspace);
  if (found != nullptr) found->check_unraised(kOp);
}

std::vector<int64_t> missing_ranks(const Tensor& workspace) {
  const auto found = known_workspace("minimax_rms::_missing_ranks", workspace);
  return found != nullptr ? found->missing_ranks() : std::vector<int64_t>();
}

void forget(const Tensor& workspace) {
  const Argument argument("minimax_rms::_forget", "workspace", workspace);
  const CurrentDevice current(argument.device().index);
  forget_workspace(static_cast<const int64_t*>(workspace.data_ptr()));
}

void announce_close(std::vector<int64_t> buffers, int64_t rank) {
  constexpr char kOp[] = "minimax_rms::_announce_close";
  const auto nranks = static_cast<int64_t>(buffers.size());
  check_rank(kOp, rank, nranks);
  const CurrentDevice current(current_device_index());
  STABLE_CUDA_CHECK(cudaDeviceSynchronize());
  const uint64_t closed = WorkspaceHeader::to_stored(1);
  for (int64_t r = 0; r < nranks; ++r) {
    if (r == rank) continue;
    STABLE_CUDA_CHECK(cudaMemcpy(&header_at(kOp, "buffers", buffers[r])->closed[rank], &closed,
                                 sizeof(closed), cudaMemcpyDefault));
  }
}

}  // namespace minimax_rms
