// armor::dual on the CPU (docs/solver.md). Rows run in parallel; a long row is cut into chunks that run in parallel too.
// The cut depends on the length alone and partial sums are added in order, so the result does not depend on threads.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "armor/row.h"

namespace armor::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 8192;

template <class T>
struct Row {
  const T *losses, *costs, *clean;  // the last two may be null
  int64_t n;
  Scaling scaling;
};

#define ARMOR_INLINE inline __attribute__((always_inline))
#define ARMOR_INLINE_LAMBDA __attribute__((always_inline))

// The row loops, compiled for every instruction set worth having.
namespace baseline {
#include "simd.h"
#include "dual_row.h"
}  // namespace baseline
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ARMOR_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "simd.h"
#include "dual_row.h"
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,fma,prefer-vector-width=512")
namespace avx512 {
#include "simd.h"
#include "dual_row.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

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
  static const Loops<T> best = [] {
#ifdef ARMOR_X86_LEVELS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Loops<T>::template of<avx512::RowLoops<T>>();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return Loops<T>::template of<avx2::RowLoops<T>>();
#endif
    return Loops<T>::template of<baseline::RowLoops<T>>();
  }();
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

// `t`, contiguous, once it is known to match `like`.
template <class T>
Tensor samples(const Tensor& t, const Tensor& like, const char* name) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == like.size(i);
  STD_TORCH_CHECK(same, "armor::dual: ", name, " has another shape than losses");
  STD_TORCH_CHECK(t.scalar_type() == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double), "armor::dual: ", name,
                  " must have the dtype of losses, float32 or float64");
  return torch::stable::contiguous(t);
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Outputs run(const Tensor& losses_in, const std::optional<Tensor>& costs_in, const std::optional<Tensor>& clean_in,
            Settings settings) {
  const Tensor losses = samples<T>(losses_in, losses_in, "losses");
  std::optional<Tensor> costs, clean;
  if (costs_in) costs = samples<T>(*costs_in, losses, "costs");
  if (clean_in) clean = samples<T>(*clean_in, losses, "clean_losses");

  const int64_t n = losses.size(losses.dim() - 1), rows = losses.numel() / n;
  std::vector<int64_t> shape(losses.dim() - 1);
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = losses.size(i);
  const auto per_row = [&](ScalarType dtype) { return torch::stable::new_empty(losses, shape, dtype); };
  const ScalarType dtype = losses.scalar_type();
  Outputs out{per_row(dtype), per_row(dtype), per_row(dtype), torch::stable::empty_like(losses),
              per_row(ScalarType::Int), per_row(ScalarType::Int)};
  auto& [value, lam, nu, weights, status, passes] = out;

  const T *loss = pointer<T>(losses), *cost = pointer<T>(costs), *kept = pointer<T>(clean);
  settings.tolerance = sizeof(T) == 4 ? 1e-6 : 1e-12;
  const Output<T> first{pointer<T>(value), pointer<T>(lam), pointer<T>(nu), pointer<T>(weights),
                        pointer<int32_t>(status), pointer<int32_t>(passes)};
  const auto solve = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<T> row{loss + r * n, cost ? cost + r * n : nullptr, kept ? kept + r * n : nullptr, n, {}};
      solve_row(row, settings, rows == 1,
                {first.value + r, first.lam + r, first.nu + r, first.weights + r * n, first.status + r,
                 first.passes + r});
    }
  };
  if (rows == 1) solve(0, 1);
  else if (rows > 1) torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 2048 / n), solve);
  return out;
}

Outputs dual(const Tensor& losses, const std::optional<Tensor>& costs, const std::optional<Tensor>& clean,
             int64_t divergence, double alpha, double radius, double kappa, double max_dual) {
  STD_TORCH_CHECK(losses.dim() > 0 && losses.size(losses.dim() - 1) > 0,
                  "armor::dual: losses must hold at least one sample along the last dimension");
  STD_TORCH_CHECK(divergence >= 0 && divergence <= 2, "armor::dual: divergence must be 0, 1 or 2, got ", divergence);
  const Settings settings{Family(static_cast<Kind>(divergence), alpha), radius, kappa, max_dual, 0.0, bool(costs),
                          bool(clean)};
  if (losses.scalar_type() == ScalarType::Float) return run<float>(losses, costs, clean, settings);
  return run<double>(losses, costs, clean, settings);
}

// Gradients of the value: the weights, on the branch that each sample took (docs/math.md, section 1).
template <class T>
std::tuple<Tensor, Tensor, Tensor> run_backward(const Tensor& grad_value, const Tensor& mu_in, const Tensor& weights_in,
                                                const Tensor& losses_in, const std::optional<Tensor>& costs_in,
                                                const std::optional<Tensor>& clean_in) {
  const Tensor grad = torch::stable::contiguous(grad_value), mu = torch::stable::contiguous(mu_in);
  const Tensor losses = samples<T>(losses_in, losses_in, "losses"), weights = samples<T>(weights_in, losses, "weights");
  std::optional<Tensor> costs, clean;
  if (costs_in) costs = samples<T>(*costs_in, losses, "costs");
  if (clean_in) clean = samples<T>(*clean_in, losses, "clean_losses");
  const auto like = [&](bool wanted) {
    return wanted ? torch::stable::empty_like(weights) : torch::stable::new_empty(weights, {0});
  };
  std::tuple<Tensor, Tensor, Tensor> out{like(true), like(bool(costs)), like(bool(clean))};
  T *to_losses = pointer<T>(std::get<0>(out)), *to_costs = pointer<T>(std::get<1>(out)),
    *to_clean = pointer<T>(std::get<2>(out));
  const T *g = pointer<T>(grad), *m = pointer<T>(mu), *w = pointer<T>(weights), *loss = pointer<T>(losses);
  const T *cost = pointer<T>(costs), *kept = pointer<T>(clean);
  const int64_t n = losses.size(losses.dim() - 1);
  torch::stable::parallel_for(0, losses.numel(), 16384, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last;) {
      const int64_t r = i / n, end = std::min(last, (r + 1) * n);
      if (!cost && !kept) {
        for (; i < end; ++i) to_losses[i] = g[r] * w[i];
        continue;
      }
      for (; i < end; ++i) {
        const T gw = g[r] * w[i];
        const bool moved = !kept || !cost || moves(loss[i], m[r], cost[i], kept[i]);
        to_losses[i] = moved ? gw : T(0);
        if (cost) to_costs[i] = moved && w[i] != T(0) ? -m[r] * gw : T(0);
        if (kept) to_clean[i] = moved ? T(0) : gw;
      }
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> dual_backward(const Tensor& grad_value, const Tensor& mu, const Tensor& weights,
                                                 const Tensor& losses, const std::optional<Tensor>& costs,
                                                 const std::optional<Tensor>& clean) {
  if (weights.scalar_type() == ScalarType::Float) return run_backward<float>(grad_value, mu, weights, losses, costs, clean);
  return run_backward<double>(grad_value, mu, weights, losses, costs, clean);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(armor, CPU, m) {
  m.impl("dual", TORCH_BOX(&dual));
  m.impl("dual_backward", TORCH_BOX(&dual_backward));
}

}  // namespace armor::cpu
