#pragma once
// A sound kernel and its faulty variants, to show that the shim tells them apart.
#include "../../../csrc/common/cuda_block.cuh"

namespace raddpo::cuda {

// out = values, reversed, through shared memory.
__global__ void reversed_kernel(const int* values, int* out) {
  __shared__ int copy[64];
  copy[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = copy[63 - threadIdx.x];
}

__global__ void missing_barrier_kernel(const int* values, int* out) {
  __shared__ int copy[64];
  copy[threadIdx.x] = values[threadIdx.x];
  out[threadIdx.x] = copy[63 - threadIdx.x];
}

__global__ void divergent_barrier_kernel(const int* values, int* out) {
  __shared__ int copy[64];
  copy[threadIdx.x] = values[threadIdx.x];
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = copy[63 - threadIdx.x];
}

__global__ void early_exit_kernel(const int* values, int* out) {
  __shared__ int copy[64];
  copy[threadIdx.x] = values[threadIdx.x];
  if (values[threadIdx.x] < 0) return;
  __syncthreads();
  out[threadIdx.x] = copy[63 - threadIdx.x];
}

__global__ void divergent_shuffle_kernel(const int* values, int* out) {
  int value = values[threadIdx.x];
  if (threadIdx.x != 5) value = __shfl_xor_sync(kAllLanes, value, 1);
  out[threadIdx.x] = value;
}

// Two launches: out = 2 * values, then 1 more, by an early launch.
__global__ void doubled_kernel(const int* values, int* out) {
  let_next_launch_begin();
  out[threadIdx.x] = 2 * values[threadIdx.x];
}

__global__ void early_kernel(const int*, int* out) {
  wait_for_launch_before();
  ++out[threadIdx.x];
}

__global__ void too_early_kernel(const int*, int* out) {
  const int before = out[threadIdx.x];
  wait_for_launch_before();
  out[threadIdx.x] = before + 1;
}

__global__ void never_waiting_kernel(const int*, int* out) { ++out[threadIdx.x]; }

}  // namespace raddpo::cuda
