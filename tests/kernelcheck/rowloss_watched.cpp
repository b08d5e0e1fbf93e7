// The kernels of csrc/cuda/rowloss.cuh under the host shim (cuemu.h), as the program that the sanitizers watch: rows of
// every sort by warps and by blocks under several schedules, each compared with the same functions run by one thread.

#include "shim.h"

#include <cstdlib>
#include <random>

#include "rowloss.cuh"

namespace {

using namespace shim;
using namespace armor;
using namespace armor::cuda;

enum class Groups { warp, block, grid };

struct How {
  unsigned blocks;
  cuemu::Schedule schedule;

  template <class Kernel, class... Arguments>
  void launch(Kernel kernel, const Arguments&... arguments) const {
    cuemu::launch(schedule, blocks, kBlock, [&] { kernel(arguments...); });
  }
};

template <class L, class T>
void solve(const How& how, Groups groups, const Rowlosses<L, T>& all, const Rows<T>& solved) {
  std::vector<double> partials(size_t{2} * how.blocks * kWidest, NAN);
  const Workspace workspace{partials.data()};
  if (groups == Groups::warp) how.launch(rowloss_dual<L, T, WarpGroup>, all, solved, workspace);
  if (groups == Groups::block) how.launch(rowloss_dual<L, T, BlockGroup>, all, solved, workspace);
  if (groups == Groups::grid) how.launch(rowloss_dual<L, T, GridGroup>, all, solved, workspace);
}

inline Settings dual_settings(int divergence, double alpha, double radius, bool wide, bool costs) {
  return {Family(static_cast<Kind>(divergence), alpha), radius, 0.0, 1e6, wide ? 1e-12 : 1e-6, costs, false};
}

// Logits of some rows, among them some that are not finite, or have no valid target. `shift` entries too far for loads
// of 16 bytes.
template <class L, class T>
struct Problem {
  int64_t rows, n, classes, shift;
  LossSettings settings;
  std::vector<L> logits, natural;
  std::vector<int64_t> target;

  Problem(int64_t rows_, int64_t n_, int64_t classes_, Loss kind, int64_t shift_)
      : rows(rows_), n(n_), classes(classes_), shift(shift_), settings{kind, 2.0, 0.1, -100},
        logits(rows * n * classes + shift) {
    std::mt19937 random(static_cast<unsigned>(classes));
    std::normal_distribution<T> normal(T(0), T(3));
    const auto fill = [&](std::vector<L>& to) {
      for (L& one : to) one = narrow<L>(normal(random));
    };
    fill(logits);
    if (settings.has_natural()) natural.resize(logits.size()), fill(natural);
    for (int64_t r = 0; r < rows * n; ++r) {
      target.push_back(r % 7 == 4 ? classes : r % 7 == 5 ? -100 : (r * 5) % classes);
      L& one = logits[shift + r * classes + classes / 2];
      if (r % 7 == 2) one = narrow<L>(-kInf);
      if (r % 7 == 6) one = narrow<L>(NAN);
    }
  }
};

template <class L, class T>
struct Results {
  std::vector<T> losses, stats, costs, value, lam, nu, weights, upstream;
  std::vector<L> to_logits, to_natural;
  std::vector<int> status, passes;
  const Problem<L, T>& p;

  explicit Results(const Problem<L, T>& problem)
      : losses(problem.rows * problem.n, T(NAN)), stats(losses.size() * problem.settings.stats_width(), T(NAN)),
        costs(losses.size()), value(problem.rows, T(NAN)), lam(value), nu(value), weights(losses),
        upstream(losses.size()), to_logits(problem.logits.size()), to_natural(problem.natural.size()),
        status(value.size(), -1), passes(status), p(problem) {
    for (size_t r = 0; r < losses.size(); ++r) costs[r] = T(0.01) * T(r % 3), upstream[r] = T(r % 4);
  }

  const L* natural() const { return p.natural.empty() ? nullptr : p.natural.data() + p.shift; }
  Rowlosses<L, T> all() {
    return {p.logits.data() + p.shift, natural(), p.target.data(), losses.data(), stats.data(), p.rows * p.n,
            p.classes, p.settings};
  }
  RowlossGradients<L, T> gradients() {
    return {upstream.data(), nullptr, p.logits.data() + p.shift, natural(), p.target.data(), stats.data(),
            to_logits.data() + p.shift, to_natural.empty() ? nullptr : to_natural.data() + p.shift, p.rows * p.n,
            p.classes, 1, p.settings};
  }
  Rows<T> solved() {
    return {losses.data(), costs.data(), nullptr, value.data(), lam.data(), nu.data(), weights.data(), status.data(),
            passes.data(), p.rows, p.n, dual_settings(0, 0.0, 0.1, sizeof(T) == 8, true)};
  }
};

template <class L>
std::vector<double> widened(const std::vector<L>& values) {
  std::vector<double> out;
  for (const L one : values) out.push_back(wide(one));
  return out;
}

template <class L, class T>
void compare(const char* name, const Problem<L, T>& problem, Groups groups, unsigned blocks, int seeds) {
  Results<L, T> alone(problem);
  const Alone one(nullptr, Workspace{});
  for (int64_t r = 0; r < problem.rows * problem.n; ++r) find_loss(alone.all(), r, one);
  for (int64_t r = 0; r < problem.rows * problem.n; ++r) find_gradient(alone.gradients(), r, one);
  cuemu::launch({}, 1, 1, [&] { solve_rows<T, Alone>(alone.solved(), Workspace{}); });

  for (int seed = 0; seed < seeds; ++seed) {
    const int before = failures;
    try {
      const How how{blocks, schedule(seed)};
      Results<L, T> got(problem), again(problem);
      solve(how, groups, got.all(), got.solved());
      how.launch(rowloss_backward<L, T>, got.gradients());
      how.launch(rowloss<L, T>, again.all());
      const double tight = sizeof(T) == 4 ? 1e-6 : 1e-12, loose = sizeof(T) == 4 ? 1e-3 : 1e-5;
      expect_close("losses", got.losses, alone.losses, tight);
      expect_close("stats", got.stats, alone.stats, tight);
      expect_close("losses again", again.losses, got.losses, 0.0);
      expect_close("value", got.value, alone.value, tight);
      expect_close("weights", got.weights, alone.weights, loose);
      expect_close("status", got.status, alone.status, 0.0);
      const double rounding = sizeof(L) == 2 ? 1e-2 : tight;
      expect_close("gradients", widened(got.to_logits), widened(alone.to_logits), rounding);
      expect_close("natural gradients", widened(got.to_natural), widened(alone.to_natural), rounding);
    } catch (const std::exception& error) {
      std::printf("  %s\n", error.what());
      ++failures;
    }
    if (failures > before) std::printf("%s, %d bytes, schedule %d\n", name, static_cast<int>(sizeof(L)), seed);
  }
}

template <class L, class T>
void compare_all(int seeds) {
  // Rows for warps and for blocks, more than there are of them; loads of one logit, of 16 bytes, and shifted ones.
  compare<L, T>("cross-entropy", {2, 9, 10, Loss::ce, 0}, Groups::warp, 2, seeds);
  compare<L, T>("TRADES", {1, 13, 40, Loss::trades, 0}, Groups::warp, 1, seeds);
  compare<L, T>("MART", {3, 5, 33, Loss::mart, 0}, Groups::block, 2, seeds);
  compare<L, T>("KL, shifted", {1, 13, 40, Loss::kl, 1}, Groups::grid, 2, seeds);
  compare<L, T>("MART by blocks", {1, 7, 1032, Loss::mart, 0}, Groups::warp, 2, seeds);
}

}  // namespace

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 3;
  compare_all<__half, float>(seeds);
  compare_all<double, double>(seeds);
  std::printf(failures ? "%d failures\n" : "all right\n", failures);
  return failures != 0;
}
