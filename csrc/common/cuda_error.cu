// What CUDA says of an error; here, as only a .cu file knows CUDA's headers.
#include <cuda_runtime.h>

namespace raddpo::cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace raddpo::cuda
