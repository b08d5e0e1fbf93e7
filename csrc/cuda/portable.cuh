// How kernel bodies spell what the host shim of tests/kernelcheck replaces, so that the same text runs on a GPU and,
// thread by thread, on a CPU: shared memory, the grid barrier and 16-bit types. No PyTorch here.
#pragma once

#ifdef ARMOR_HOST_SHIM
#include "cuemu.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED_ARRAY(T, name, size) __shared__ T name[size]
#define __grid_sync() cooperative_groups::this_grid().sync()

// The compiler forgets what it knows of a pointer or an int64_t.
template <class Word>
__device__ inline void hide(Word& word) {
  asm volatile("" : "+l"(word));
}
#endif
