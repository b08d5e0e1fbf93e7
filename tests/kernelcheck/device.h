// The device of csrc/cuda/launch.h where there is no GPU: operators take CPU tensors, and their kernels run in the
// threads of cuemu.h or are handed to cuda_ops.py, which executes what nvcc makes of them.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "cuemu.h"

// A library holds one .cu. Its operators are registered in the namespace that it is told to use.
#define ARMOR_OPERATORS(m)                                                                    \
  static void operators(torch::stable::detail::StableLibrary& m);                             \
  extern "C" void register_operators(const char* name) {                                      \
    using torch::stable::detail::StableLibrary;                                               \
    static StableLibrary library(StableLibrary::Kind::IMPL, name, "CPU", __FILE__, __LINE__); \
    operators(library);                                                                       \
  }                                                                                           \
  void operators(torch::stable::detail::StableLibrary& m)

namespace armor::cuda {

using torch::stable::Tensor;
using cudaStream_t = void*;  // there is one

struct Launch {
  const char* kernel;  // its mangled name
  int64_t blocks;
  int threads;
  bool cooperative;
  int count;  // of arguments
  const void* const* arguments;
  const int64_t* sizes;  // in bytes
};

enum class Answer : int { run_in_threads, done, failed };

struct Device {
  int processors = 1;  // each of which holds one block at a time
  cuemu::Schedule schedule;
  Answer (*launched)(const Launch*) = nullptr;
};

inline Device device;

extern "C" inline __attribute__((used)) void set_device(int processors, int order, uint64_t seed,
                                                        Answer (*launched)(const Launch*)) {
  device = {processors, {static_cast<cuemu::Order>(order), seed}, launched};
}

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
inline int processors(const Tensor&) { return device.processors; }

template <class Kernel>
int64_t resident_blocks(const Tensor&, Kernel, int) {
  return device.processors;
}

// On a GPU, whether all blocks are resident is checked by the launch, too.
template <class... Arguments>
void launch(bool cooperative, void (*kernel)(Arguments...), int64_t blocks, int threads, Arguments... arguments) {
  STD_TORCH_CHECK(!cooperative || blocks <= device.processors, "armor: launch: too many blocks in cooperative launch");
  void* const address = reinterpret_cast<void*>(kernel);
  Dl_info symbol;
  STD_TORCH_CHECK(dladdr(address, &symbol) && symbol.dli_saddr == address, "armor: launch: the kernel has no name");
  const void* pointers[] = {&arguments...};
  const int64_t sizes[] = {sizeof(Arguments)...};
  const Launch call{symbol.dli_sname, blocks, threads, cooperative, sizeof...(Arguments), pointers, sizes};
  const Answer answer = device.launched(&call);
  STD_TORCH_CHECK(answer != Answer::failed, "armor: launch: ", symbol.dli_sname, " failed");
  if (answer == Answer::done) return;
  cuemu::Schedule schedule = device.schedule;
  schedule.cooperative = cooperative;
  if (!cooperative) schedule.resident = static_cast<unsigned>(device.processors);
  cuemu::launch(schedule, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), [&] { kernel(arguments...); });
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int64_t blocks, int threads, cudaStream_t, Arguments... arguments) {
  launch(false, kernel, blocks, threads, arguments...);
}

template <class... Arguments>
void launch_cooperatively(void (*kernel)(Arguments...), int64_t blocks, int threads, cudaStream_t,
                          Arguments... arguments) {
  launch(true, kernel, blocks, threads, arguments...);
}

}  // namespace armor::cuda
