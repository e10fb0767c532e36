#pragma once
// What every op's torch side needs: tensors, devices, threads. Includes torch; kernels never do.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "logit_type.h"
#ifdef RADDPO_WITH_CUDA
#include "cuda_stream.h"
#endif

namespace raddpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A tensor of an operator's arguments, by its name there.
struct NamedTensor {
  const char* name;
  const Tensor* tensor;  // null: not given
  NamedTensor(const char* argument, const Tensor& given) : name(argument), tensor(&given) {}
  NamedTensor(const char* argument, const OptionalTensor& given) : name(argument), tensor(given ? &*given : nullptr) {}
};

inline std::string device_name(const torch::stable::Device& device) {
  const std::string index = device.has_index() ? ":" + std::to_string(device.index()) : "";
  if (device.type() == torch::headeronly::DeviceType::CPU) return "cpu";
  if (device.type() == torch::headeronly::DeviceType::CUDA) return "cuda" + index;
  return "device type " + std::to_string(static_cast<int>(device.type())) + index;
}

// All on the first one's device. Called by every operator before it takes a pointer: a CUDA kernel that is given one of
// the host's leaves the process without a GPU.
inline void check_device(const char* op, std::initializer_list<NamedTensor> tensors) {
  const NamedTensor& first = *tensors.begin();
  const torch::stable::Device device = first.tensor->device();
  for (const NamedTensor& given : tensors) {
    if (!given.tensor) continue;
    const torch::stable::Device other = given.tensor->device();
    STD_TORCH_CHECK(other == device, op, ": ", given.name, " must be on the device of ", first.name, ", ",
                    device_name(device), ", got ", device_name(other));
  }
}

template <typename T>
ScalarType type_of() = delete;
template <>
inline ScalarType type_of<float>() {
  return ScalarType::Float;
}
template <>
inline ScalarType type_of<double>() {
  return ScalarType::Double;
}
template <>
inline ScalarType type_of<std::int64_t>() {
  return ScalarType::Long;
}
template <>
inline ScalarType type_of<bool>() {
  return ScalarType::Bool;
}

inline void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType type, std::int64_t size) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.is_contiguous() && t.numel() == size, op, ": ", name,
                  " must be contiguous, of the documented type and of ", size, " elements");
}

// The data of a checked argument; null if it is not given.
template <typename T>
const T* data_of(const char* op, const char* name, const Tensor& t, std::int64_t size) {
  check_tensor(op, name, t, type_of<T>(), size);
  return t.const_data_ptr<T>();
}
template <typename T>
const T* data_of(const char* op, const char* name, const OptionalTensor& t, std::int64_t size) {
  return t ? data_of<T>(op, name, *t, size) : nullptr;
}

// Whether an argument that may be float32 or float64 is float32.
inline bool is_float32(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op, ": ", name,
                  " must be float32 or float64");
  return t.scalar_type() == ScalarType::Float;
}

inline LogitType logit_type_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return LogitType::float32;
    case ScalarType::BFloat16:
      return LogitType::bfloat16;
    case ScalarType::Half:
      return LogitType::float16;
    default:
      STD_TORCH_CHECK(false, op, ": logits must be float32, bfloat16 or float16");
  }
}

// In the words by which accelerate tells that a smaller batch may fit. torch's C shim does not hand over its reason,
// but writes it to stderr.
inline std::string no_memory_for(std::initializer_list<std::int64_t> sizes) {
  std::string text;
  for (const std::int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "raddpo_ext: out of memory. Tried to allocate a tensor of shape (" + text + ")";
}

// Asked before torch is, on the CPU: where its allocator throws for want of memory, its C shim asks the error for its
// text, that for a backtrace, and c10 reads what backtrace_symbols returns unchecked: null, where there is no memory
// for it either. The spare bytes are for what torch allocates beside the tensor, and for that backtrace.
inline bool has_memory(double bytes) {
  constexpr double kSpare = 1 << 15, kMost = std::int64_t(1) << 47;  // of an address space
  if (bytes > kMost) return false;
  void* volatile probe = std::malloc(static_cast<std::size_t>(bytes + kSpare));  // volatile: not optimised away
  std::free(probe);
  return probe != nullptr;
}

// A contiguous tensor on the device of `like`. Straight from torch's C shim: torch::stable::new_empty looks its
// operator up by name on every call, which is a tenth of a small beam step.
inline Tensor new_empty(const Tensor& like, std::initializer_list<std::int64_t> sizes, ScalarType type) {
  std::array<std::int64_t, 4> strides{};
  std::int64_t stride = 1;
  double elements = 1;  // which cannot overflow
  for (std::size_t d = sizes.size(); d-- > 0; stride *= sizes.begin()[d]) {
    strides[d] = stride;
    elements *= static_cast<double>(sizes.begin()[d]);
  }
  const std::int32_t code = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                            : type == ScalarType::Long     ? aoti_torch_dtype_int64()
                            : type == ScalarType::Double   ? aoti_torch_dtype_float64()
                            : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                            : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                            : type == ScalarType::Bool     ? aoti_torch_dtype_bool()
                                                           : aoti_torch_dtype_uint8();
  std::int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  if (device == aoti_torch_device_type_cpu() && !has_memory(elements * aoti_torch_dtype_element_size(code)))
    throw std::runtime_error(no_memory_for(sizes));
  AtenTensorHandle handle = nullptr;
  const auto dims = static_cast<std::int64_t>(sizes.size());
  const int error =
      aoti_torch_empty_strided(dims, sizes.begin(), strides.data(), code, device, like.get_device_index(), &handle);
  if (error) throw std::runtime_error(no_memory_for(sizes));
  return Tensor(handle);
}

// Runs body(begin, end) over [0, size) on torch's threads; pieces of at least `grain`.
template <typename Body>
void parallel_for(std::int64_t size, std::int64_t grain, const Body& body) {
  if (size <= grain)
    body(std::int64_t(0), size);
  else
    torch::stable::parallel_for(0, size, grain, body);
}

#ifdef RADDPO_WITH_CUDA
namespace cuda {
const char* error_text(int error);  // cuda_error.cu
}

inline void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, " at the kernel's launch: ", cuda::error_text(error));
}
#endif

}  // namespace raddpo
