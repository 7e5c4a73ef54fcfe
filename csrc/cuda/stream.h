// The caller's stream, by torch's C interface: c10's CUDA headers need a CUDA build of torch even to compile.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>

// The interface shows its CUDA part only where this is defined.
#if !defined(USE_CUDA)
#define USE_CUDA
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace firp {

inline cudaStream_t current_stream(const at::Tensor& tensor) {
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.device().index(), &stream) == AOTI_TORCH_SUCCESS, "no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error) { TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

}  // namespace firp
