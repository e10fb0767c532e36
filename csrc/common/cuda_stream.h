#pragma once
// The current CUDA stream, from torch's C shim. The symbol lives in libtorch_cuda; declared weak, so that this library
// also loads beside a CPU-only torch, where no CUDA tensor can ever reach a kernel.
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

struct CUstream_st;
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace raddpo {

inline CUstream_st* current_cuda_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<CUstream_st*>(stream);
}

}  // namespace raddpo
