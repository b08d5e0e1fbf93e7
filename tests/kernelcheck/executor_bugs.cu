// Kernels that hold one bug each, to test the PTX executor itself: `broken` chooses between the bug and its repair. Every
// thread of a repaired kernel leaves 1 in out. tests/test_executor.py says what each bug must come to.

#include <cooperative_groups.h>

constexpr unsigned kThreads = 64;  // of a block

struct Memory {
  double* out;       // one number a thread
  double* partials;  // one number a block
  unsigned* ticket;  // 0 at first
};

__device__ unsigned rank() { return blockIdx.x * kThreads + threadIdx.x; }

// ---- within a block ------------------------------------------------------------------------------------------------

extern "C" __global__ void missing_barrier(Memory m, bool broken) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  if (!broken) __syncthreads();
  const unsigned other = kThreads - 1 - threadIdx.x;
  m.out[rank()] = values[other] - other + 1;
}

// Scratch that is used again before everybody has read it, as in two reductions on end.
extern "C" __global__ void reused_too_early(Memory m, bool broken) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const unsigned other = kThreads - 1 - threadIdx.x;
  const double first = values[other];
  if (!broken) __syncthreads();
  values[threadIdx.x] = -1.0;
  __syncthreads();
  m.out[rank()] = values[other] * (other - first) + 1;
}

extern "C" __global__ void missing_warp_barrier(Memory m, bool broken) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = threadIdx.x;
  if (!broken) __syncwarp();
  const unsigned other = threadIdx.x ^ 1;
  m.out[rank()] = values[other] - other + 1;
}

extern "C" __global__ void missing_barrier_of_global_memory(Memory m, bool broken) {
  m.out[rank()] = 1.0;
  if (!broken) __syncthreads();
  if (m.out[blockIdx.x * kThreads + kThreads - 1 - threadIdx.x] != 1.0) m.partials[blockIdx.x] = 0.0;
}

extern "C" __global__ void unwritten_shared(Memory m, bool broken) {
  __shared__ double values[kThreads];
  if (threadIdx.x < kThreads / 2 || !broken) values[threadIdx.x] = 1.0;
  __syncthreads();
  double sum = 0.0;
  for (unsigned i = 0; i < kThreads; ++i) sum += values[i];
  m.out[rank()] = sum / kThreads;
}

extern "C" __global__ void beyond_shared(Memory m, bool broken) {
  __shared__ double values[kThreads];
  values[threadIdx.x + (broken ? 1 : 0)] = 1.0;
  __syncthreads();
  m.out[rank()] = values[kThreads - 1];
}

extern "C" __global__ void beyond_global(Memory m, bool broken) {
  const unsigned all = gridDim.x * kThreads + (broken ? 1 : 0);
  for (unsigned i = rank(); i < all; i += gridDim.x * kThreads) m.out[i] = 1.0;
}

extern "C" __global__ void misaligned(Memory m, bool broken) {
  const double2 pair = *reinterpret_cast<const double2*>(m.partials + (broken ? 1 : 0));
  m.out[rank()] = pair.x + pair.y + 1;
}

// ---- collectives that not all threads call -------------------------------------------------------------------------

extern "C" __global__ void divergent_barrier(Memory m, bool broken) {
  if (broken && threadIdx.x < 32) {
    m.out[rank()] = 2.0;
    __syncthreads();
  } else {
    __syncthreads();
  }
  m.out[rank()] = 1.0;
}

extern "C" __global__ void partial_barrier(Memory m, bool broken) {
  if (threadIdx.x < 32 || !broken) __syncthreads();
  m.out[rank()] = 1.0;
}

extern "C" __global__ void partial_shuffle(Memory m, bool broken) {
  double one = 1.0;
  if (threadIdx.x % 32 < 16 || !broken) one = __shfl_xor_sync(0xffffffffu, one, 1);
  m.out[rank()] = one;
}

extern "C" __global__ void shuffle_from_an_absent_lane(Memory m, bool broken) {
  double one = 1.0;
  if (threadIdx.x % 32 < 16) one = __shfl_xor_sync(0x0000ffffu, one, broken ? 16 : 8);
  m.out[rank()] = one;
}

// ---- between blocks ------------------------------------------------------------------------------------------------

extern "C" __global__ void missing_grid_barrier(Memory m, bool broken) {
  if (threadIdx.x == 0) m.partials[blockIdx.x] = blockIdx.x;
  if (!broken) cooperative_groups::this_grid().sync();
  const unsigned other = (blockIdx.x + 1) % gridDim.x;
  m.out[rank()] = m.partials[other] - other + 1;
}

extern "C" __global__ void plain_increment(Memory m, bool broken) {
  if (threadIdx.x == 0) {
    if (broken) ++*m.ticket;
    else atomicAdd(m.ticket, 1u);
  }
  m.out[rank()] = 1.0;
}

// The block that draws the last ticket adds up what all blocks have left. `wrong` says what one of its bugs leaves out.
template <char wrong>
__device__ void last_block(Memory m, bool broken) {
  __shared__ bool last;
  m.out[rank()] = 1.0;
  if (threadIdx.x == 0) {
    unsigned drawn = 0;
    const auto draw = [&] { drawn = broken && wrong == 'a' ? (*m.ticket)++ : atomicAdd(m.ticket, 1u); };
    if (broken && wrong == 'o') draw();
    m.partials[blockIdx.x] = 1.0 / gridDim.x;
    if (!(broken && wrong == 'f')) __threadfence();
    if (!(broken && wrong == 'o')) draw();
    last = drawn == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  if (!(broken && wrong == 'r')) __threadfence();
  double sum = 0.0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += m.partials[b];
  m.out[rank()] = sum;
}

extern "C" __global__ void early_ticket(Memory m, bool broken) { last_block<'o'>(m, broken); }
extern "C" __global__ void unfenced_ticket(Memory m, bool broken) { last_block<'f'>(m, broken); }
extern "C" __global__ void unfenced_sum(Memory m, bool broken) { last_block<'r'>(m, broken); }
extern "C" __global__ void plain_ticket(Memory m, bool broken) { last_block<'a'>(m, broken); }

extern "C" __global__ void waits_for_ever(Memory m, bool broken) {
  if (threadIdx.x == 0) {
    atomicAdd(m.ticket, 1u);
    while (*const_cast<volatile unsigned*>(m.ticket) < gridDim.x + (broken ? 1 : 0)) {
    }
  }
  m.out[rank()] = 1.0;
}
