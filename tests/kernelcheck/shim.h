// What the programs that the sanitizers watch share: a group of one thread, schedules and comparisons. It is included
// first, because it says what __device__ is.
#pragma once

#include "cuemu.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "dual.cuh"

namespace shim {

// A group of one thread: the kernel as a plain loop.
struct Alone {
  static constexpr int kSolvers = 1;
  Alone(double*, armor::cuda::Workspace) {}
  int64_t first_row() const { return 0; }
  int64_t row_step() const { return 1; }
  int64_t rank() const { return 0; }
  int64_t size() const { return 1; }
  int solver() const { return 0; }
  bool leads() const { return true; }
  bool writes() const { return true; }
  void sync() const {}
  template <class Part>
  Part reduce(const Part& mine) const {
    return mine;
  }
  template <class Part>
  Part all(const Part& mine) const {
    return mine;
  }
};

// Forward, reverse, then random ones.
inline cuemu::Schedule schedule(int number) {
  using cuemu::Order;
  return {number == 0 ? Order::forward : number == 1 ? Order::reverse : Order::random, static_cast<uint64_t>(number)};
}

inline int failures = 0;

template <class T>
void expect_close(const char* what, const std::vector<T>& got, const std::vector<T>& expected, double tolerance) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double a = static_cast<double>(got[i]), b = static_cast<double>(expected[i]);
    const bool same = a == b || (std::isnan(a) && std::isnan(b));
    if (same || std::fabs(a - b) <= tolerance * std::fmax(1.0, std::fabs(b))) continue;
    std::printf("  %s[%zu] is %.17g, expected %.17g\n", what, i, a, b);
    ++failures;
    return;
  }
}

}  // namespace shim
