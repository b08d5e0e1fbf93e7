// Kernels that hold one bug each, to test the host shim itself: `bugs NAME broken SCHEDULES` runs one of them, and
// `bugs NAME right SCHEDULES` runs it with the bug repaired. Exits with 0 when every schedule gave the right result,
// with 1 when one did not, with 2 when the shim refused one, and as a sanitizer pleases when that objects.
// tests/test_kernelcheck.py tells which of these every bug must come to.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "portable.cuh"

namespace {

constexpr unsigned kThreads = 64;
constexpr unsigned kBlocks = 4;

struct Memory {
  double* out;       // [kBlocks * kThreads]; every thread of a right kernel leaves 1 here
  double* partials;  // [kBlocks]
  unsigned* ticket;
};

__device__ unsigned rank() { return blockIdx.x * kThreads + threadIdx.x; }

// ---- within a block ------------------------------------------------------------------------------------------------

__global__ void missing_barrier(Memory m, bool broken) {
  SHARED_ARRAY(double, values, kThreads);
  values[threadIdx.x] = threadIdx.x;
  if (!broken) __syncthreads();
  const unsigned other = kThreads - 1 - threadIdx.x;
  m.out[rank()] = values[other] - other + 1;
}

// Scratch that is used again before everybody has read it, as in two reductions on end.
__global__ void reused_too_early(Memory m, bool broken) {
  SHARED_ARRAY(double, values, kThreads);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const unsigned other = kThreads - 1 - threadIdx.x;
  const double first = values[other];
  if (!broken) __syncthreads();
  values[threadIdx.x] = -1.0;
  __syncthreads();
  m.out[rank()] = values[other] * (other - first) + 1;
}

__global__ void missing_warp_barrier(Memory m, bool broken) {
  SHARED_ARRAY(double, values, kThreads);
  values[threadIdx.x] = threadIdx.x;
  if (!broken) __syncwarp();
  const unsigned other = threadIdx.x ^ 1;
  m.out[rank()] = values[other] - other + 1;
}

__global__ void unwritten_shared(Memory m, bool broken) {
  SHARED_ARRAY(double, values, kThreads);
  if (threadIdx.x < kThreads / 2 || !broken) values[threadIdx.x] = 1.0;
  __syncthreads();
  double sum = 0.0;
  for (unsigned i = 0; i < kThreads; ++i) sum += values[i];
  m.out[rank()] = sum / kThreads;
}

__global__ void beyond_shared(Memory m, bool broken) {
  SHARED_ARRAY(double, values, kThreads);
  double* const place = values + threadIdx.x;
  place[broken ? 1 : 0] = 1.0;
  m.out[rank()] = 1.0;
}

__global__ void beyond_global(Memory m, bool broken) {
  const unsigned all = kBlocks * kThreads + (broken ? 1 : 0);
  for (unsigned i = rank(); i < all; i += kBlocks * kThreads) m.out[i] = 1.0;
}

__global__ void misaligned(Memory m, bool broken) {
  const float pair[3] = {0.0f, 0.0f, 0.0f};
  const float* from = pair;
  if (reinterpret_cast<uintptr_t>(from) % alignof(double) != 0) ++from;
  m.out[rank()] = 1.0 + *reinterpret_cast<const double*>(from + (broken ? (from == pair ? 1 : -1) : 0));
}

// ---- collectives that not all threads call -------------------------------------------------------------------------

__global__ void divergent_barrier(Memory m, bool broken) {
  if (broken && threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  m.out[rank()] = 1.0;
}

__global__ void partial_barrier(Memory m, bool broken) {
  if (threadIdx.x < 32 || !broken) __syncthreads();
  m.out[rank()] = 1.0;
}

__global__ void partial_shuffle(Memory m, bool broken) {
  double one = 1.0;
  if (threadIdx.x % 32 < 16 || !broken) one = __shfl_xor_sync(0xffffffffu, one, 1);
  m.out[rank()] = one;
}

__global__ void mismatched_shuffle(Memory m, bool broken) {
  double one = 1.0;
  if (threadIdx.x == 5 && broken)
    __syncwarp();
  else
    one = __shfl_xor_sync(0xffffffffu, one, 2);
  m.out[rank()] = one;
}

// ---- between blocks ------------------------------------------------------------------------------------------------

__global__ void missing_grid_barrier(Memory m, bool broken) {
  if (threadIdx.x == 0) m.partials[blockIdx.x] = blockIdx.x;
  if (!broken) __grid_sync();
  const unsigned other = (blockIdx.x + 1) % gridDim.x;
  m.out[rank()] = m.partials[other] - other + 1;
}

// The block that draws the last ticket adds up what all blocks have left. `wrong` says what one of its bugs leaves out.
template <char wrong>
__global__ void last_block(Memory m, bool broken) {
  SHARED_ARRAY(bool, last, 1);
  m.out[rank()] = 1.0;
  if (threadIdx.x == 0) {
    unsigned drawn = 0;
    const auto draw = [&] { drawn = broken && wrong == 'a' ? (*m.ticket)++ : atomicAdd(m.ticket, 1u); };
    if (broken && wrong == 'o') draw();
    m.partials[blockIdx.x] = 1.0 / kBlocks;
    if (!(broken && wrong == 'f')) __threadfence();
    if (!(broken && wrong == 'o')) draw();
    last[0] = drawn == gridDim.x - 1;
  }
  __syncthreads();
  if (!last[0] || threadIdx.x != 0) return;
  __threadfence();
  double sum = 0.0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += m.partials[b];
  m.out[rank()] = sum;
}

// ---- all of them ---------------------------------------------------------------------------------------------------

struct Bug {
  const char* name;
  void (*kernel)(Memory, bool);
};

constexpr Bug kBugs[] = {
    {"missing_barrier", missing_barrier},
    {"reused_too_early", reused_too_early},
    {"missing_warp_barrier", missing_warp_barrier},
    {"unwritten_shared", unwritten_shared},
    {"beyond_shared", beyond_shared},
    {"beyond_global", beyond_global},
    {"misaligned", misaligned},
    {"divergent_barrier", divergent_barrier},
    {"partial_barrier", partial_barrier},
    {"partial_shuffle", partial_shuffle},
    {"mismatched_shuffle", mismatched_shuffle},
    {"missing_grid_barrier", missing_grid_barrier},
    {"early_ticket", last_block<'o'>},
    {"unfenced_ticket", last_block<'f'>},
    {"plain_ticket", last_block<'a'>},
    {"grid_barrier_of_waiting_blocks", missing_grid_barrier},  // broken in its launch
};

bool right(const Bug& bug, bool broken, cuemu::Schedule schedule) {
  std::vector<double> out(kBlocks * kThreads, NAN), partials(kBlocks, NAN);
  unsigned ticket = 0;
  const Memory memory{out.data(), partials.data(), &ticket};
  if (std::strcmp(bug.name, "grid_barrier_of_waiting_blocks") == 0) {
    if (broken) schedule.resident = kBlocks - 1;
    broken = false;
  }
  cuemu::launch(schedule, kBlocks, kThreads, [&] { bug.kernel(memory, broken); });
  for (const double one : out)
    if (one != 1.0) return false;
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 3;
  for (const Bug& bug : kBugs) {
    if (std::strcmp(argv[1], bug.name) != 0) continue;
    int outcome = 0;
    for (int seed = 0; seed < std::atoi(argv[3]); ++seed) {
      const auto order = seed == 0 ? cuemu::Order::forward : seed == 1 ? cuemu::Order::reverse : cuemu::Order::random;
      try {
        if (!right(bug, std::strcmp(argv[2], "broken") == 0, {order, static_cast<uint64_t>(seed)})) outcome = 1;
      } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
        return 2;
      }
    }
    return outcome;
  }
  return 3;
}
