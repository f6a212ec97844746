// One op for each thing that the headers offer.
#include "probe.h"

#include <torch/csrc/stable/library.h>

#include "stable_common/cuda_check.h"
#include "stable_common/device_properties.h"
#include "stable_common/driver_api.h"
#include "stable_common/stream.h"
#include "stable_common/tensor_check.h"

namespace {

using stable_common::Argument;
using stable_common::Dim;
using stable_common::ScalarType;
using torch::stable::Tensor;

void check_arguments(const Tensor& x, const Tensor& weight, const Tensor& out) {
  const Argument x_argument("probe::check_arguments", "x", x);
  x_argument.has_dtype({ScalarType::BFloat16, ScalarType::Half})
      .has_shape({"N", 16})
      .is_dense_from(1)
      .is_aligned(16, 1);
  Argument("probe::check_arguments", "weight", weight)
      .has_dtype_of(x_argument)
      .has_shape({Dim("N", x.size(0), "x.size(0)"), "K"})
      .is_dense_from(0)
      .is_on_device_of(x_argument);
  Argument("probe::check_arguments", "out", out).has_no_overlap();
}

void check_on_cpu(const Tensor& x) { Argument("probe::check_on_cpu", "x", x).is_on_cpu(); }

bool torch_has_cuda() { return stable_common::torch_has_cuda(); }

bool has_driver_function(std::string name) {
  return stable_common::driver_function<void (*)()>(name.c_str(), 12000) != nullptr;
}

void fail_driver_call(int64_t code) { STABLE_CU_CHECK(static_cast<CUresult>(code)); }

int64_t compute_capability(int64_t device_index) {
  stable_common::DeviceProperties device;
  STABLE_CUDA_CHECK(stable_common::get_device_properties(static_cast<int>(device_index), &device));
  return device.compute_capability;
}

void convert(const Tensor& values, Tensor bytes, Tensor exponents) {
  const int32_t device_index = values.get_device_index();
  const stable_common::CurrentDevice current(device_index);
  stable_common::DeviceProperties device;
  STABLE_CUDA_CHECK(stable_common::get_device_properties(device_index, &device));
  STABLE_CUDA_CHECK(launch_convert(
      values.data_ptr(), static_cast<uint8_t*>(bytes.data_ptr()),
      static_cast<int32_t*>(exponents.data_ptr()), static_cast<int>(exponents.numel()),
      values.scalar_type() == ScalarType::BFloat16 ? stable_common::Float16Type::kBFloat16
                                                   : stable_common::Float16Type::kFloat16,
      device.has_programmatic_dependent_launch(), stable_common::current_stream(device_index)));
  STD_CUDA_KERNEL_LAUNCH_CHECK();  // torch's own, which needs a torch with CUDA
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(stable_common_probe, m) {
  m.def("check_arguments(Tensor x, Tensor weight, Tensor out) -> ()");
  m.def("check_on_cpu(Tensor x) -> ()");
  m.def("torch_has_cuda() -> bool");
  m.def("has_driver_function(str name) -> bool");
  m.def("fail_driver_call(int code) -> ()");
  m.def("compute_capability(int device_index) -> int");
  m.def("convert(Tensor values, Tensor(a!) bytes, Tensor(b!) exponents) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stable_common_probe, CompositeExplicitAutograd, m) {
  m.impl("check_arguments", TORCH_BOX(&check_arguments));
  m.impl("check_on_cpu", TORCH_BOX(&check_on_cpu));
  m.impl("torch_has_cuda", TORCH_BOX(&torch_has_cuda));
  m.impl("has_driver_function", TORCH_BOX(&has_driver_function));
  m.impl("fail_driver_call", TORCH_BOX(&fail_driver_call));
  m.impl("compute_capability", TORCH_BOX(&compute_capability));
}

STABLE_TORCH_LIBRARY_IMPL(stable_common_probe, CUDA, m) { m.impl("convert", TORCH_BOX(&convert)); }
