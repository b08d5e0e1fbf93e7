// The kernels of csrc/cuda/dual.cuh under the host shim (cuemu.h), as the program that the sanitizers watch: rows of
// every sort through every kind of group under several schedules, each compared with the same kernel run by one thread.

#include "shim.h"

#include <cstdlib>
#include <random>

namespace {

using namespace armor;
using namespace armor::cuda;
using shim::Alone;
using shim::expect_close;
using shim::failures;

enum class Groups { alone, warp, block, grid };

struct How {
  Groups groups;
  int blocks;
  cuemu::Schedule schedule;
};

template <class T>
void solve(const How& how, const Rows<T>& rows) {
  std::vector<double> partials(size_t{2} * how.blocks * kWidest, NAN);
  const Workspace workspace{partials.data()};
  const auto launch = [&](auto kernel, unsigned blocks, unsigned threads) {
    cuemu::launch(how.schedule, blocks, threads, [&] { kernel(rows, workspace); });
  };
  const unsigned blocks = static_cast<unsigned>(how.blocks);
  if (how.groups == Groups::alone) launch(dual<T, Alone>, 1, 1);
  if (how.groups == Groups::warp) launch(dual<T, WarpGroup>, blocks, kBlock);
  if (how.groups == Groups::block) launch(dual<T, BlockGroup>, blocks, kBlock);
  if (how.groups == Groups::grid) launch(dual<T, GridGroup>, blocks, kBlock);
}

// Some rows of length n, the last of which are not finite, all of one value, or full of ties.
template <class T>
struct Problem {
  int64_t rows, n;
  std::vector<T> losses, costs, clean;

  Problem(int64_t rows_, int64_t n_, bool with_costs, bool with_clean) : rows(rows_), n(n_), losses(rows_ * n_) {
    std::mt19937 random(static_cast<unsigned>(n));
    std::normal_distribution<T> normal;
    std::uniform_real_distribution<T> uniform;
    for (T& loss : losses) loss = normal(random);
    for (int64_t r = 1; r < rows; ++r)
      for (int64_t i = 0; i < n; ++i) {
        T& loss = losses[r * n + i];
        if (r % 4 == 1) loss = std::round(loss);
        if (r % 4 == 2) loss = T(2.5);
        if (r % 4 == 3 && i == n / 2) loss = r % 8 == 3 ? T(NAN) : T(kInf);
      }
    for (const T loss : losses) {
      if (with_costs) costs.push_back(T(0.1) * uniform(random));
      if (with_clean) clean.push_back(loss - uniform(random));
    }
  }
};

template <class T>
struct Solution {
  std::vector<T> value, lam, nu, weights;
  std::vector<int> status, passes;

  Solution(const Problem<T>& p, const Settings& settings, const How& how)
      : value(p.rows, T(NAN)),
        lam(value),
        nu(value),
        weights(p.losses.size(), T(NAN)),
        status(p.rows, -1),
        passes(status) {
    solve(how, Rows<T>{p.losses.data(), p.costs.empty() ? nullptr : p.costs.data(),
                       p.clean.empty() ? nullptr : p.clean.data(), value.data(), lam.data(), nu.data(), weights.data(),
                       status.data(), passes.data(), p.rows, p.n, settings});
  }
};

template <class T>
void compare(const char* name, const Problem<T>& problem, const Settings& settings, How how, int seeds) {
  const Solution<T> alone(problem, settings, {Groups::alone, 1, {}});
  for (int seed = 0; seed < seeds; ++seed) {
    how.schedule = shim::schedule(seed);
    const int before = failures;
    try {
      const Solution<T> got(problem, settings, how);
      // The value is flat at the optimum, so that what belongs to it has about half of its digits.
      const double tight = sizeof(T) == 4 ? 1e-6 : 1e-12, loose = sizeof(T) == 4 ? 1e-3 : 1e-5;
      expect_close("value", got.value, alone.value, tight);
      expect_close("lam", got.lam, alone.lam, loose);
      expect_close("nu", got.nu, alone.nu, loose);
      expect_close("weights", got.weights, alone.weights, loose);
      expect_close("status", got.status, alone.status, 0.0);
    } catch (const std::exception& error) {
      std::printf("  %s\n", error.what());
      ++failures;
    }
    if (failures > before) std::printf("%s, %d bytes, schedule %d\n", name, static_cast<int>(sizeof(T)), seed);
  }
}

template <class T>
void compare_all(int seeds) {
  const double tolerance = sizeof(T) == 4 ? 1e-6 : 1e-12;
  const Settings kl{Family(Kind::kl, 0.0), 0.1, 0.0, 1e6, tolerance, false, false};
  const Settings alpha{Family(Kind::alpha, 6.0), 0.1, 0.01, 1e6, tolerance, true, false};
  const Settings renyi{Family(Kind::renyi, 1.25), 0.1, 0.0, 1e6, tolerance, true, true};
  const How warps{Groups::warp, 1, {}}, blocks{Groups::block, 2, {}}, grid{Groups::grid, 2, {}};
  // More rows than there are groups; lengths below, at and above the threads of a group.
  compare<T>("warps, KL", {13, 31, false, false}, kl, warps, seeds);
  compare<T>("warps, alpha with costs", {9, 32, true, false}, alpha, warps, seeds);
  compare<T>("warps, Renyi with costs and clean losses", {9, 45, true, true}, renyi, warps, seeds);
  compare<T>("blocks, KL", {5, 257, false, false}, kl, blocks, seeds);
  compare<T>("blocks, Renyi with costs and clean losses", {3, 300, true, true}, renyi, blocks, seeds);
  compare<T>("grid, KL", {4, 513, false, false}, kl, grid, seeds);
  compare<T>("grid, alpha with costs", {1, 700, true, false}, alpha, grid, seeds);
}

}  // namespace

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 3;
  compare_all<float>(seeds);
  compare_all<double>(seeds);
  std::printf(failures ? "%d failures\n" : "all right\n", failures);
  return failures != 0;
}
