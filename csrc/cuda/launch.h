// What the launches of dual.cu and rowloss.cu share: the current stream, the size of a grid, the launch itself, and
// errors of the CUDA runtime as exceptions of PyTorch. The tests without a GPU have a device of their own.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef ARMOR_HOST_SHIM
#include "device.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define ARMOR_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(armor, CUDA, m)

namespace armor::cuda {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it, so that it is not taken for another call's
  STD_TORCH_CHECK(false, "armor: ", what, ": ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int processors(const Tensor& t) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()), "device query");
  return count;
}

// How many blocks of a cooperative kernel the device holds at once.
template <class Kernel>
int64_t resident_blocks(const Tensor& t, Kernel kernel, int threads) {
  int per_processor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0), "occupancy");
  return static_cast<int64_t>(per_processor) * processors(t);
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  void* pointers[] = {&arguments...};
  check(cudaLaunchKernel(reinterpret_cast<void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), pointers, 0, stream),
        "launch");
}

// With every block resident, so that all of them can meet at a barrier.
template <class... Arguments>
void launch_cooperatively(void (*kernel)(Arguments...), int64_t blocks, int threads, cudaStream_t stream,
                          Arguments... arguments) {
  void* pointers[] = {&arguments...};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                    dim3(static_cast<unsigned>(threads)), pointers, 0, stream),
        "launch");
}

}  // namespace armor::cuda
#endif

namespace armor::cuda {

// Blocks for `work` groups of which a block holds `per_block`. Kernels loop, so more than a few waves gain nothing.
inline int64_t blocks_for(const Tensor& t, int64_t work, int64_t per_block) {
  return std::min(int64_t{32} * processors(t), (work + per_block - 1) / per_block);
}

}  // namespace armor::cuda
