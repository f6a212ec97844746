#include "ops.h"

#include <cstdlib>
#include <memory>
#include <optional>
#include <utility>

#include "all_reduce.h"
#include "communicator.h"
#include "stable_common/allocate.h"
#include "stable_common/cuda_check.h"
#include "stable_common/dtype.h"
#include "stable_common/large_calls.h"
#include "stable_common/peer_memory.h"
#include "stable_common/stream.h"
#include "stable_common/tensor_check.h"

namespace custom_ar {

namespace {

using stable_common::Argument;
using stable_common::check;
using stable_common::current_device_index;
using stable_common::CurrentDevice;
using stable_common::element_bytes;
using stable_common::element_type_of;
using stable_common::ScalarType;

constexpr char kAllReduce[] = "custom_ar::all_reduce";
constexpr char kAllReduceAs[] = "custom_ar::_all_reduce_as";
constexpr char kInit[] = "custom_ar::init_custom_ar";
constexpr char kDispose[] = "custom_ar::dispose";
constexpr char kRegisterBuffer[] = "custom_ar::register_buffer";
constexpr char kGetGraphMeta[] = "custom_ar::get_graph_buffer_ipc_meta";
constexpr char kRegisterGraph[] = "custom_ar::register_graph_buffers";
constexpr char kAllocate[] = "custom_ar::allocate_shared_buffer_and_handle";
constexpr char kOpen[] = "custom_ar::open_mem_handle";
constexpr char kFree[] = "custom_ar::free_shared_buffer";

// What a caller that sizes its buffers by meta_size() + max_size shares beside the header: enough
// that messages of up to 8 MiB, that caller's usual limit, pass in one piece at every world size.
// Larger ones pass in several.
constexpr int64_t kMetaDataBytes = int64_t{24} << 20;

constexpr int64_t kMaxElements = int64_t{1} << kDescriptorElementBits;

std::vector<void*> pointers(const char* op, const char* name, const std::vector<int64_t>& values) {
  check(values.size() >= 2 && values.size() <= kMaxWorldSize, op, name,
        " must have an entry for each of 2 to ", kMaxWorldSize, " ranks, got ", values.size());
  std::vector<void*> result;
  for (size_t r = 0; r < values.size(); ++r) {
    check(values[r] > 0 && values[r] % kVectorBytes == 0, op, name, "[", r,
          "] must be the address of a buffer, aligned to ", kVectorBytes, " bytes, got ",
          values[r]);
    result.push_back(reinterpret_cast<void*>(values[r]));
  }
  return result;
}

void check_world_size(const char* op, int64_t world_size) {
  check(world_size >= 2 && world_size <= kMaxWorldSize, op, "world_size must be in [2, ",
        kMaxWorldSize, "], got ", world_size);
}

void check_entries(const char* op, const char* name, size_t count, const Communicator& fa) {
  check(count == static_cast<size_t>(fa.world_size()), op, name,
        " must have an entry for each of the ", fa.world_size(), " ranks, got ", count);
}

// Contiguous, or a permutation of it: the elements fill memory without gaps, each once.
bool is_dense(const Argument& tensor) {
  if (tensor.rank() > 64) return false;
  int64_t expected = 1;
  // Each dimension must continue where the smaller strides end; the order is theirs to choose.
  uint64_t done = 0;
  for (int64_t n = 0; n < tensor.rank(); ++n) {
    int64_t next = -1;
    for (int64_t dim = 0; dim < tensor.rank(); ++dim) {
      if ((done >> dim & 1) != 0) continue;
      if (tensor.size(dim) == 1 || tensor.stride(dim) == expected) {
        next = dim;
        if (tensor.size(dim) != 1) break;
      }
    }
    if (next < 0) return false;
    done |= uint64_t{1} << next;
    expected *= tensor.size(next);
  }
  return true;
}

bool same_strides(const Argument& a, const Argument& b) {
  for (int64_t dim = 0; dim < a.rank(); ++dim) {
    if (a.size(dim) != 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}

stable_common::ListText strides_of(const Tensor& tensor) { return {tensor.strides()}; }

struct Message {
  const void* input;
  int64_t num_elements;
  ElementType type;
  int64_t num_bytes() const { return num_elements * element_bytes(type); }
};

bool is_on_device_of(const Communicator& fa, const Argument& inp) {
  return inp.device().is_cuda() && inp.device().index == fa.device_index();
}

Message make_message(const Argument& inp) {
  return {.input = inp.tensor().data_ptr(),
          .num_elements = inp.tensor().numel(),
          .type = element_type_of(inp)};
}

// Whether the kernels take `inp`, of up to `max_size` bytes.
bool is_supported(const Communicator& fa, const Argument& inp, int64_t max_size) {
  if (!is_on_device_of(fa, inp) || !element_type_of(inp.dtype())) return false;
  const Message message = make_message(inp);
  return message.num_elements > 0 && message.num_elements < kMaxElements &&
         message.num_bytes() <= max_size && is_dense(inp);
}

Message check_input(const Communicator& fa, const Argument& inp) {
  inp.has_dtype({ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  inp.require(is_on_device_of(fa, inp), "must be on the device of fa, cuda:", fa.device_index(),
              ", got ", inp.device());
  const Message message = make_message(inp);
  if (message.num_elements == 0) return message;
  inp.require(is_dense(inp), "must be dense (contiguous, or a permutation of that), got strides ",
              strides_of(inp.tensor()), " for shape ", inp.shape());
  inp.require(message.num_elements < kMaxElements, "must have fewer than ", kMaxElements,
              " elements, got ", message.num_elements);
  return message;
}

void check_output(const Argument& out, const Argument& inp, const Message& message) {
  out.has_dtype_of(inp).is_on_device_of(inp);
  bool has_shape = out.rank() == inp.rank();
  for (int64_t dim = 0; has_shape && dim < inp.rank(); ++dim) {
    has_shape = out.size(dim) == inp.size(dim);
  }
  out.require(has_shape, "must have the shape of inp, ", inp.shape(), ", got ", out.shape());
  if (message.num_elements == 0) return;
  out.require(same_strides(out, inp), "must have the strides of inp, ", strides_of(inp.tensor()),
              ", got ", strides_of(out.tensor()));
  const auto input = reinterpret_cast<intptr_t>(message.input);
  const auto output = reinterpret_cast<intptr_t>(out.tensor().data_ptr());
  out.require(input == output || std::abs(input - output) >= message.num_bytes(),
              "must be inp itself or not overlap it");
}

// Not initialised, of the shape, strides and dtype of `inp`.
Tensor allocate_like(const char* op, const Argument& inp, const Message& message) {
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(inp.tensor().get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(inp.tensor().get(), &strides));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(inp.tensor().get(), &dtype));
  return stable_common::allocate_tensor(op, inp.rank(), sizes, strides, dtype, inp.device(),
                                        "the result, ", message.num_bytes(), " bytes on ",
                                        inp.device());
}

void run(const char* op, Communicator& fa, const Message& message, void* output,
         const AllReduceTuning& tuning) {
  if (message.num_elements == 0) return;
  const CurrentDevice current(fa.device_index());
  fa.all_reduce(op, message.input, output, message.num_elements, message.type, tuning,
                stable_common::current_stream(fa.device_index()));
}

}  // namespace

int64_t init_custom_ar(std::vector<int64_t> ipc_tensors, const Tensor& rank_data, int64_t rank,
                       bool fully_connected) {
  // Data is pushed the same way whether peers are connected by NVLink or by PCIe.
  (void)fully_connected;
  const std::vector<void*> buffers = pointers(kInit, "ipc_tensors", ipc_tensors);
  check(rank >= 0 && rank < static_cast<int64_t>(buffers.size()), kInit, "rank must be in [0, ",
        buffers.size(), "), got ", rank);
  const int32_t device_index = rank_data.get_device_index();
  const CurrentDevice current(device_index);
  return add_communicator(
      std::make_shared<Communicator>(kInit, buffers, static_cast<int>(rank), device_index));
}

void all_reduce(int64_t fa, const Tensor& inp, Tensor out, int64_t reg_buffer,
                int64_t reg_buffer_sz_bytes) {
  const auto communicator = find_communicator(kAllReduce, fa);
  const Argument input(kAllReduce, "inp", inp);
  const Message message = check_input(*communicator, input);
  check_output(Argument(kAllReduce, "out", out), input, message);
  check(reg_buffer == 0 || reg_buffer_sz_bytes >= message.num_bytes(), kAllReduce,
        "reg_buffer_sz_bytes must be at least the size of inp, ", message.num_bytes(),
        " bytes, got ", reg_buffer_sz_bytes);
  run(kAllReduce, *communicator, message, out.data_ptr(),
      communicator->choose_tuning(message.num_bytes()));
}

bool try_all_reduce(int64_t fa, const Tensor& inp, Tensor out, int64_t max_size) {
  const auto communicator = find_communicator(kAllReduce, fa);
  const Argument input(kAllReduce, "inp", inp);
  if (!is_supported(*communicator, input, max_size)) return false;
  const Message message = make_message(input);
  check_output(Argument(kAllReduce, "out", out), input, message);
  run(kAllReduce, *communicator, message, out.data_ptr(),
      communicator->choose_tuning(message.num_bytes()));
  return true;
}

std::optional<Tensor> try_all_reduce_new(int64_t fa, const Tensor& inp, int64_t max_size) {
  const auto communicator = find_communicator(kAllReduce, fa);
  const Argument input(kAllReduce, "inp", inp);
  if (!is_supported(*communicator, input, max_size)) return std::nullopt;
  const Message message = make_message(input);
  Tensor out = allocate_like(kAllReduce, input, message);
  run(kAllReduce, *communicator, message, out.data_ptr(),
      communicator->choose_tuning(message.num_bytes()));
  return out;
}

void dispose(int64_t fa) {
  const CurrentDevice current(find_communicator(kDispose, fa)->device_index());
  remove_communicator(kDispose, fa);
}

int64_t meta_size() { return kHeaderBytes + kMetaDataBytes; }

void register_buffer(int64_t fa, std::vector<int64_t> ipc_tensors) {
  const auto communicator = find_communicator(kRegisterBuffer, fa);
  check_entries(kRegisterBuffer, "ipc_tensors", ipc_tensors.size(), *communicator);
  communicator->add_mappings(pointers(kRegisterBuffer, "ipc_tensors", ipc_tensors));
}

std::tuple<std::vector<int64_t>, std::vector<int64_t>> get_graph_buffer_ipc_meta(int64_t fa) {
  find_communicator(kGetGraphMeta, fa);
  return {};
}

void register_graph_buffers(int64_t fa, std::vector<std::vector<int64_t>> handles,
                            std::vector<std::vector<int64_t>> offsets) {
  const auto communicator = find_communicator(kRegisterGraph, fa);
  check_entries(kRegisterGraph, "handles", handles.size(), *communicator);
  check_entries(kRegisterGraph, "offsets", offsets.size(), *communicator);
}

std::tuple<int64_t, Tensor> allocate_shared_buffer_and_handle(int64_t size) {
  check(size > 0, kAllocate, "size must be positive, got ", size);
  const CurrentDevice current(current_device_index());
  cudaIpcMemHandle_t handle = {};
  void* address = stable_common::allocate_shared(kAllocate, size, 0, &handle);
  return {reinterpret_cast<int64_t>(address), stable_common::handle_tensor(handle)};
}

int64_t open_mem_handle(const Tensor& mem_handle) {
  const cudaIpcMemHandle_t handle =
      stable_common::tensor_handle(Argument(kOpen, "mem_handle", mem_handle));
  const CurrentDevice current(current_device_index());
  return reinterpret_cast<int64_t>(stable_common::open_shared(handle));
}

void free_shared_buffer(int64_t ptr) {
  stable_common::free_shared(kFree, "ptr", "allocate_shared_buffer_and_handle or open_mem_handle",
                             reinterpret_cast<void*>(ptr));
}

int64_t buffer_size(int64_t world_size, int64_t max_size) {
  constexpr char kOp[] = "custom_ar::_buffer_size";
  check_world_size(kOp, world_size);
  check(max_size > 0 && max_size <= int64_t{1} << 40, kOp, "max_size must be in [1, 2^40], got ",
        max_size);
  const int64_t least = 2 * kMaxWorldSize * kVectorBytes;
  const int64_t slot = std::max(slot_bytes_for(static_cast<int>(world_size), max_size), least);
  return kHeaderBytes + kNumSlots * slot;
}

void set_timeout(int64_t fa, double seconds) {
  constexpr char kOp[] = "custom_ar::_set_timeout";
  stable_common::check_timeout(kOp, seconds);
  find_communicator(kOp, fa)->set_timeout(seconds);
}

void set_max_blocks(int64_t fa, int64_t max_blocks) {
  constexpr char kOp[] = "custom_ar::_set_max_blocks";
  check(max_blocks >= 1 && max_blocks <= 65535, kOp, "max_blocks must be in [1, 65535], got ",
        max_blocks);
  find_communicator(kOp, fa)->set_max_blocks(static_cast<int>(max_blocks));
}

void keep_mappings(int64_t fa) {
  find_communicator("custom_ar::_keep_mappings", fa)->keep_mappings();
}

int64_t large_calls() { return reinterpret_cast<int64_t>(&stable_common::LargeCalls::instance()); }

void use_large_calls(int64_t address) {
  check(address != 0, "custom_ar::_use_large_calls",
        "address must be what _large_calls returned, got 0");
  stable_common::LargeCalls::use(reinterpret_cast<stable_common::LargeCalls*>(address));
}

// Named as the op whose calls it checks.
void check_calls(int64_t fa) { find_communicator(kAllReduce, fa)->check_failure(kAllReduce); }
void check_unraised(int64_t fa) { find_communicator(kAllReduce, fa)->check_unraised(kAllReduce); }

std::vector<int64_t> missing_ranks(int64_t fa) {
  return find_communicator("custom_ar::_missing_ranks", fa)->missing_ranks();
}

void announce_close(int64_t fa) {
  const auto communicator = find_communicator("custom_ar::_announce_close", fa);
  const CurrentDevice current(communicator->device_index());
  communicator->announce_close();
}

void all_reduce_as(int64_t fa, const Tensor& inp, Tensor out, int64_t algorithm, int64_t num_blocks,
                   int64_t threads_per_block, int64_t depth) {
  const auto communicator = find_communicator(kAllReduceAs, fa);
  const Argument input(kAllReduceAs, "inp", inp);
  const Message message = check_input(*communicator, input);
  check_output(Argument(kAllReduceAs, "out", out), input, message);
  check(algorithm == 0 || algorithm == 1, kAllReduceAs,
        "algorithm must be 0 (one shot) or 1 (two shots), got ", algorithm);
  check(num_blocks >= 1 && num_blocks <= 65535, kAllReduceAs, "num_blocks must be in [1, 65535], ",
        "got ", num_blocks);
  check(threads_per_block >= 1 && threads_per_block <= kMaxDataThreads, kAllReduceAs,
        "threads_per_block must be in [1, ", kMaxDataThreads, "], got ", threads_per_block);
  check(depth >= 1 && depth <= 1024, kAllReduceAs, "depth must be in [1, 1024], got ", depth);
  run(kAllReduceAs, *communicator, message, out.data_ptr(),
      {static_cast<Algorithm>(algorithm), static_cast<int>(num_blocks),
       static_cast<int>(threads_per_block), static_cast<int>(depth)});
}

std::vector<int64_t> choose_tuning_of(int64_t world_size, int64_t num_bytes) {
  constexpr char kOp[] = "custom_ar::_choose_tuning";
  check_world_size(kOp, world_size);
  check(num_bytes >= 0, kOp, "num_bytes must be at least 0, got ", num_bytes);
  const AllReduceTuning tuning = choose_tuning(static_cast<int>(world_size), num_bytes);
  return {static_cast<int64_t>(tuning.algorithm), tuning.num_blocks, tuning.threads_per_block,
          tuning.depth};
}

}  // namespace custom_ar
