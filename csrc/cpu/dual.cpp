// armor::dual on the CPU (docs/solver.md). Rows run in parallel; a long row is cut into chunks that do so, too.
// The cut depends on the length alone and partial sums are added in order, so the result does not depend on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../tensors.h"
#include "dual_rows.h"

namespace armor::cpu {
namespace {

constexpr int64_t kChunk = 8192;

template <class T>
struct Row {
  const T *losses, *costs, *clean;  // the last two may be null
  int64_t n;
  Scaling scaling;
};

#define ARMOR_LOOPS "dual_row.h"
#include "levels.h"

template <class T>
struct Loops {
  Scan (*scan)(const Row<T>&, int64_t, int64_t);
  Top (*top)(const Row<T>&, int64_t, int64_t, double);
  Sums (*sums)(const Row<T>&, int64_t, int64_t, const Point&);
  void (*write)(const Row<T>&, int64_t, int64_t, const Point&, double, T*);

  template <class Level>
  static Loops of() {
    return {Level::scan, Level::top, Level::sums, Level::write};
  }
};

template <class T>
const Loops<T>& loops() {
  static const Loops<T> best = ARMOR_BEST(Loops<T>, RowLoops<T>);
  return best;
}

// Calls body(chunk, begin, end) for every chunk of a row of n samples.
template <class Body>
void for_chunks(int64_t n, bool parallel, const Body& body) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const auto range = [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) body(c, c * kChunk, std::min(n, (c + 1) * kChunk));
  };
  if (parallel && chunks > 1) torch::stable::parallel_for(0, chunks, 1, range);
  else range(0, chunks);
}

// The chunks' results, added in order.
template <class Part, class Body>
Part over_chunks(int64_t n, bool parallel, const Body& body) {
  if (n <= kChunk) return body(0, n);
  std::vector<Part> parts((n + kChunk - 1) / kChunk);
  for_chunks(n, parallel, [&](int64_t c, int64_t begin, int64_t end) { parts[c] = body(begin, end); });
  Part all = parts[0];
  for (size_t c = 1; c < parts.size(); ++c) all.add(parts[c]);
  return all;
}

template <class T>
struct Output {
  T *value, *lam, *nu, *weights;
  int32_t *status, *passes;
};

template <class T>
void answer_nonfinite(const Row<T>& row, const Output<T>& out) {
  const auto entry = [&](int64_t i) {
    return deciding_entry(row.losses[i], row.costs ? row.costs[i] : 0.0, row.clean, row.clean ? row.clean[i] : 0.0);
  };
  double worst = -kInf, decide = 0.0;
  for (int64_t i = 0; i < row.n && !std::isnan(worst); ++i) {
    const double e = entry(i);
    if (std::isnan(e) || e == kInf) worst = e;
  }
  for (int64_t i = 0; i < row.n; ++i) decide += entry(i) == worst;
  for (int64_t i = 0; i < row.n; ++i)
    out.weights[i] = static_cast<T>(std::isnan(worst) ? worst : entry(i) == worst ? 1.0 / decide : 0.0);
  *out.value = *out.nu = static_cast<T>(worst);
  *out.lam = static_cast<T>(std::isnan(worst) ? worst : 0.0);
  *out.status = static_cast<int32_t>(Status::nonfinite);
}

template <class T>
void solve_row(Row<T> row, const Settings& settings, bool parallel, const Output<T>& out) {
  const Loops<T>& loop = loops<T>();
  const int64_t n = row.n;
  const Scan scan = over_chunks<Scan>(
      n, parallel, [&](int64_t begin, int64_t end) { return loop.scan(row, begin, end); });
  *out.passes = 1;
  if (scan.defect != 0.0 || scan.usable == 0.0) return answer_nonfinite(row, out);

  RowSolver solver(settings, scan, static_cast<double>(n), origin_of(row.losses[0]));
  row.scaling = solver.scaling;
  while (!solver.done) {
    Point point = solver.point;
    if (row.costs)
      point.top = over_chunks<Top>(
          n, parallel, [&](int64_t begin, int64_t end) { return loop.top(row, begin, end, point.mu); });
    const Sums sums = over_chunks<Sums>(
        n, parallel, [&](int64_t begin, int64_t end) { return loop.sums(row, begin, end, point); });
    solver.update(sums, point.top);
  }
  const Result result = solver.result();
  for_chunks(n, parallel, [&](int64_t, int64_t begin, int64_t end) {
    loop.write(row, begin, end, solver.point, result.weight_scale, out.weights);
  });
  *out.value = static_cast<T>(result.value);
  *out.lam = static_cast<T>(result.lam);
  *out.nu = static_cast<T>(result.nu);
  *out.status = static_cast<int32_t>(result.status);
  *out.passes = solver.passes;
}

}  // namespace

template <class T>
void solve_rows(const Rows<T>& all) {
  const int64_t n = all.n;
  const auto solve = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<T> row{all.losses + r * n, all.costs ? all.costs + r * n : nullptr,
                       all.clean ? all.clean + r * n : nullptr, n, {}};
      solve_row(row, all.settings, all.rows == 1,
                {all.value + r, all.lam + r, all.nu + r, all.weights + r * n, all.status + r, all.passes + r});
    }
  };
  if (all.rows == 1) solve(0, 1);
  else torch::stable::parallel_for(0, all.rows, std::max<int64_t>(1, 2048 / n), solve);
}

template void solve_rows(const Rows<float>&);
template void solve_rows(const Rows<double>&);

namespace {

DualOutputs dual_op(const Tensor& losses, const std::optional<Tensor>& costs, const std::optional<Tensor>& clean,
                    int64_t divergence, double alpha, double radius, double kappa, double max_dual) {
  return dual(losses, costs, clean, divergence, alpha, radius, kappa, max_dual,
              [](const auto& rows, const Tensor&) { solve_rows(rows); });
}

DualGradients dual_backward_op(const Tensor& grad, const Tensor& mu, const Tensor& weights, const Tensor& losses,
                               const std::optional<Tensor>& costs, const std::optional<Tensor>& clean) {
  return dual_backward(grad, mu, weights, losses, costs, clean, [](const auto& g, const Tensor&) {
    torch::stable::parallel_for(0, g.rows * g.n, 16384, [&](int64_t first, int64_t last) {
      for (int64_t i = first, r = first / g.n; i < last; ++i) {
        if (i == (r + 1) * g.n) ++r;
        g.write(r, i);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(armor, CPU, m) {
  m.impl("dual", TORCH_BOX(&dual_op));
  m.impl("dual_backward", TORCH_BOX(&dual_backward_op));
}

}  // namespace armor::cpu
