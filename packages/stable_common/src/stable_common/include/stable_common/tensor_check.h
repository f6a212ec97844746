// Argument checks whose messages say the op, the argument, what was expected and what came:
//   deepseek_mla::insert: kv must have shape [N, 512] with N = q_in.size(0) = 17, got [16, 512]
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>

namespace stable_common {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error (Python's RuntimeError) with the parts put together. Nothing is
// formatted while `condition` holds.
template <typename... Parts>
inline void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << op << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// One expected dimension: a fixed size, any size (with a name for the message), or a named size
// that equals something else. Sizes that are computed pass what they are computed from.
struct Dim {
  static constexpr int64_t kAny = -1;

  Dim(int64_t fixed) : size(fixed) {}                      // NOLINT: implicit, for brace lists
  Dim(int fixed) : size(fixed) {}                          // NOLINT
  Dim(const char* symbol) : size(kAny), symbol(symbol) {}  // NOLINT
  Dim(const char* symbol, int64_t size, const char* source)
      : size(size), symbol(symbol), source(source) {}

  int64_t size;
  const char* symbol = nullptr;
  const char* source = nullptr;
};

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "torch.float8_e5m2";
    default:
      return torch::headeronly::toString(dtype);
  }
}

// What a message shows of a tensor. They are formatted only when they are written, so that a check
// that holds costs a comparison.
struct ListText {
  torch::headeronly::IntHeaderOnlyArrayRef values;
};

inline std::ostream& operator<<(std::ostream& stream, const ListText& list) {
  stream << "[";
  const char* separator = "";
  for (const int64_t value : list.values) {
    stream << separator << value;
    separator = ", ";
  }
  return stream << "]";
}

struct Device {
  int32_t type = 0;
  int32_t index = -1;

  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
  bool operator==(const Device&) const = default;
};

inline std::ostream& operator<<(std::ostream& stream, const Device& device) {
  if (device.is_cuda()) return stream << "cuda:" << device.index;
  return stream << (device.type == aoti_torch_device_type_cpu() ? "cpu" : "neither cuda nor cpu");
}

// A tensor argument of an op. Each check returns the argument, so that checks chain.
class Argument {
 public:
  Argument(const char* op, const char* name, const Tensor& tensor)
      : op_(op), name_(name), tensor_(tensor) {
    // None reaches an op as a tensor without a value.
    require(tensor.defined(), "must be a tensor, got None");
    // Each question to libtorch is a call into another library: ask once for what checks ask often.
    const AtenTensorHandle handle = tensor.get();
    int64_t rank = 0;
    int64_t* sizes = nullptr;
    int64_t* strides = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &rank));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_.type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_.index));
    dtype_ = tensor.scalar_type();
    sizes_ = {sizes, static_cast<size_t>(rank)};
    strides_ = {strides, static_cast<size_t>(rank)};
    element_size_ = static_cast<int64_t>(tensor.element_size());
  }

  const Tensor& tensor() const { return tensor_; }
  const char* name() const { return name_; }
  ScalarType dtype() const { return dtype_; }
  int64_t rank() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t dim) const { return sizes_[dim]; }
  int64_t stride(int64_t dim) const { return strides_[dim]; }
  int64_t stride_bytes(int64_t dim) const { return stride(dim) * element_size_; }
  const Device& device() const { return device_; }
  ListText shape() const { return {sizes_}; }

  template <typename... Parts>
  void require(bool condition, const Parts&... parts) const {
    check(condition, op_, name_, " ", parts...);
  }

  const Argument& has_dtype(std::initializer_list<ScalarType> allowed) const {
    for (const ScalarType dtype : allowed) {
      if (dtype == dtype_) return *this;
    }
    std::ostringstream names;
    const char* separator = "";
    for (const ScalarType dtype : allowed) {
      names << separator << dtype_name(dtype);
      separator = " or ";
    }
    require(false, "must be ", names.str(), ", got ", dtype_name(dtype_));
    return *this;
  }

  const Argument& has_dtype_of(const Argument& other) const {
    require(dtype_ == other.dtype_, "must have the dtype of ", other.name_, ", ",
            dtype_name(other.dtype_), ", got ", dtype_name(dtype_));
    return *this;
  }

  const Argument& is_on_device_of(const Argument& other) const {
    require(device_ == other.device_, "must be on the device of ", other.name_, ", ",
            other.device(), ", got ", device());
    return *this;
  }

  // What the host reads.
  const Argument& is_on_cpu() const {
    require(device_.type == aoti_torch_device_type_cpu(), "must be on the CPU, got ", device_);
    return *this;
  }

  const Argument& has_shape(std::initializer_list<Dim> expected) const {
    bool matches = static_cast<size_t>(rank()) == expected.size();
    int64_t dim = 0;
    for (const Dim& d : expected) {
      matches = matches && (d.size == Dim::kAny || d.size == size(dim));
      ++dim;
    }
    if (!matches) require(false, "must have shape ", shape_text(expected), ", got ", shape());
    return *this;
  }

  // Every stride is the one of a contiguous tensor from `first_dim` on, as far as it matters.
  const Argument& is_dense_from(int64_t first_dim) const {
    int64_t expected = 1;
    bool dense = true;
    bool empty = false;
    for (int64_t dim = rank() - 1; dim >= first_dim; --dim) {
      dense = dense && (size(dim) == 1 || stride(dim) == expected);
      empty = empty || size(dim) == 0;
      expected *= size(dim);
    }
    dense = dense || empty;
    if (first_dim == 0) {
      require(dense, "must be contiguous, got strides ", ListText{strides_}, " for shape ",
              shape());
    } else {
      require(dense, "must be contiguous from dimension ", first_dim, " on, got strides ",
              ListText{strides_}, " for shape ", shape());
    }
    return *this;
  }

  // The data pointer and the strides of all dimensions below `first_dense_dim` are multiples of
  // `bytes`, so that every row can be accessed in vectors of that size.
  const Argument& is_aligned(int64_t bytes, int64_t first_dense_dim = 0) const {
    const auto address = reinterpret_cast<uintptr_t>(tensor_.data_ptr());
    require(address % static_cast<uintptr_t>(bytes) == 0, "must be aligned to ", bytes,
            " bytes, got an address that is ", address % static_cast<uintptr_t>(bytes),
            " past a multiple");
    for (int64_t dim = 0; dim < first_dense_dim; ++dim) {
      require(size(dim) <= 1 || stride_bytes(dim) % bytes == 0, "must have a stride of dimension ",
              dim, " that is a multiple of ", bytes, " bytes, got ", stride_bytes(dim), " bytes");
    }
    return *this;
  }

  // No two elements share memory, so that a kernel may write them in any order: each stride steps
  // over all that the smaller strides span. A few odd strides that interlock are refused with it.
  const Argument& has_no_overlap() const {
    bool overlaps = false;
    for (int64_t dim = 0; dim < rank(); ++dim) {
      int64_t span = 1;
      for (int64_t other = 0; other < rank(); ++other) {
        const bool is_inner =
            stride(other) < stride(dim) || (stride(other) == stride(dim) && other > dim);
        if (is_inner && size(other) > 1) span += (size(other) - 1) * stride(other);
      }
      overlaps = overlaps || (size(dim) > 1 && stride(dim) < span);
    }
    require(!overlaps || tensor_.numel() == 0, "must not overlap itself, got strides ",
            ListText{strides_}, " for shape ", shape());
    return *this;
  }

 private:
  static std::string shape_text(std::initializer_list<Dim> dims) {
    std::ostringstream shape;
    std::ostringstream sources;
    shape << "[";
    const char* separator = "";
    const char* source_separator = " with ";
    for (const Dim& dim : dims) {
      shape << separator;
      separator = ", ";
      if (dim.symbol == nullptr) {
        shape << dim.size;
        continue;
      }
      shape << dim.symbol;
      if (dim.source != nullptr) {
        sources << source_separator << dim.symbol << " = " << dim.source << " = " << dim.size;
        source_separator = ", ";
      }
    }
    shape << "]" << sources.str();
    return shape.str();
  }

  const char* op_;
  const char* name_;
  const Tensor& tensor_;
  ScalarType dtype_ = ScalarType::Undefined;
  Device device_;
  torch::headeronly::IntHeaderOnlyArrayRef sizes_;
  torch::headeronly::IntHeaderOnlyArrayRef strides_;
  int64_t element_size_ = 0;
};

}  // namespace stable_common
