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

#include "armor/dual.h"

namespace armor::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 8192;

// One row in raw units; a scaled loss is (loss * unit - max) * inverse_range. `unit` is 1, or 1/2 where the range would
// overflow.
template <class T>
struct Row {
  const T *losses, *costs, *clean;  // the last two may be null
  int64_t n;
  double unit = 1.0, max = 0.0, inverse_range = 1.0;
};

struct Point {
  double b, mu, k;
  Top top;
};

struct Scan {
  double max = -kInf, min = kInf, ties = 0.0;
  double sum = 0.0, sum_squares = 0.0;  // of loss - loss of the row's first sample
  double cost_sum = 0.0;
  double defect = 0.0;  // NaN if an entry is not finite (a cost may be +inf)

  void merge_extremes(double other_max, double other_min, double other_ties) {
    ties = other_max > max ? other_ties : other_max == max ? ties + other_ties : ties;
    max = std::fmax(max, other_max);
    min = std::fmin(min, other_min);
  }
  void merge(const Scan& o) {
    merge_extremes(o.max, o.min, o.ties);
    sum += o.sum, sum_squares += o.sum_squares, cost_sum += o.cost_sum, defect += o.defect;
  }
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

// The chunks' results, folded in order.
template <class Part, class Body, class Fold>
Part over_chunks(int64_t n, bool parallel, const Body& body, const Fold& fold) {
  if (n <= kChunk) return body(0, n);
  std::vector<Part> parts((n + kChunk - 1) / kChunk);
  for_chunks(n, parallel, [&](int64_t c, int64_t begin, int64_t end) { parts[c] = body(begin, end); });
  Part all = parts[0];
  for (size_t c = 1; c < parts.size(); ++c) fold(all, parts[c]);
  return all;
}

template <class T>
struct Output {
  T *value, *lam, *nu, *weights;
  int32_t *status, *passes;
};

// A row with an entry that is not finite: NaN wins, then +inf, then -inf, as in a mean; the weights are uniform on the
// entries that decide.
template <class T>
void answer_nonfinite(const Row<T>& row, const Output<T>& out) {
  const auto entry = [&](int64_t i) -> double {
    const double cost = row.costs ? row.costs[i] : 0.0;
    double loss = cost < kInf ? row.losses[i] : std::isnan(cost) || std::isnan(row.losses[i]) ? std::nan("") : -kInf;
    if (cost == -kInf) loss = std::nan("");
    if (!row.clean) return loss;
    return std::isnan(row.clean[i]) || std::isnan(loss) ? std::nan("") : std::fmax(loss, row.clean[i]);
  };
  double worst = kInf, decide = 0.0;
  bool nan = false, plus = false;
  for (int64_t i = 0; i < row.n; ++i) nan |= std::isnan(entry(i)), plus |= entry(i) == kInf;
  worst = nan ? std::nan("") : plus ? kInf : -kInf;
  for (int64_t i = 0; i < row.n; ++i) decide += entry(i) == worst;
  for (int64_t i = 0; i < row.n; ++i)
    out.weights[i] = static_cast<T>(nan ? worst : entry(i) == worst ? 1.0 / decide : 0.0);
  *out.value = *out.nu = static_cast<T>(worst);
  *out.lam = static_cast<T>(nan ? worst : 0.0);
  *out.status = static_cast<int32_t>(Status::nonfinite);
}

template <class T>
void solve_row(Row<T> row, const Family& family, double radius, double kappa, double max_dual, bool parallel,
               const Output<T>& out) {
  const Loops<T>& loop = loops<T>();
  const int64_t n = row.n;
  const Scan scan = over_chunks<Scan>(
      n, parallel, [&](int64_t begin, int64_t end) { return loop.scan(row, begin, end); },
      [](Scan& a, const Scan& b) { a.merge(b); });
  *out.passes = 1;
  if (scan.defect != 0.0) return answer_nonfinite(row, out);

  row.unit = scan.max - scan.min < kInf ? 1.0 : 0.5;
  row.max = scan.max * row.unit;
  const double spread = row.max - scan.min * row.unit;
  const bool equal = spread < 1e-290;
  const double range = (equal ? 1.0 : spread) / row.unit;
  row.inverse_range = equal ? 1.0 : 1.0 / spread;

  Point point{0.0, 0.0, family.k, {}};
  Answer answer{};
  double scale = 1.0 / n, log_s0 = 0.0;
  if (!row.costs && (radius == 0.0 || equal)) {
    const bool saturated = equal && kappa == 0.0;
    const double mean = equal ? 0.0 : (scan.sum / n + row.losses[0] - scan.max) / range;
    const double mu = equal ? kappa / range : kInf;
    answer = {mean, mu, saturated ? kInf : 0.0, saturated ? Status::saturated : Status::converged};
  } else {
    const double mean = scan.sum / n, variance = std::fmax(scan.sum_squares / n - mean * mean, 0.0);
    const double least_std = 0.5 / std::sqrt(static_cast<double>(n));  // of a row whose range is one
    const Moments moments{static_cast<double>(n), scan.ties, (mean + row.losses[0] - scan.max) / range,
                          std::fmax(std::sqrt(variance) / range, row.costs ? 1e-3 : least_std),
                          row.clean ? kInf : scan.cost_sum / n};
    const Problem problem{family, radius, kappa / range, max_dual / range,
                          sizeof(T) == 4 ? 1e-6 : 1e-12, row.costs != nullptr, row.clean != nullptr};
    DualSolver solver(problem, moments);
    Sums sums;
    bool done = solver.trivial();
    for (int round = 0; !done && round < DualSolver::kMaxRounds; ++round) {
      point.b = solver.b, point.mu = solver.mu;
      if (row.costs) {
        point.top = over_chunks<Top>(
            n, parallel, [&](int64_t begin, int64_t end) { return loop.top(row, begin, end, point.mu); },
            [](Top& a, const Top& b) { if (b.v > a.v) a = b; });
        if (point.top.v == -kInf) return answer_nonfinite(row, out);  // every cost is infinite
        ++*out.passes;
      }
      sums = over_chunks<Sums>(
          n, parallel, [&](int64_t begin, int64_t end) { return loop.sums(row, begin, end, point); },
          [](Sums& a, const Sums& b) { a.add(b); });
      ++*out.passes;
      done = solver.update(sums, point.top);
    }
    answer = solver.answer(done);
    scale = 1.0 / (answer.b == kInf ? scan.ties : sums.w);
    log_s0 = answer.b == kInf ? 0.0 : std::log(sums.w / n);
  }

  point.b = answer.b;
  for_chunks(n, parallel, [&](int64_t, int64_t begin, int64_t end) {
    loop.write(row, begin, end, point, scale, out.weights);
  });
  ++*out.passes;
  const double mu = answer.mu * range, top = scan.max + point.top.v * range;
  *out.value = static_cast<T>(scan.max + answer.value * range);
  *out.lam = static_cast<T>(std::fmax(mu - kappa, 0.0));
  *out.nu = static_cast<T>(multiplier(family, top, mu, answer.b / range, log_s0));
  *out.status = static_cast<int32_t>(answer.status);
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
            const Family& family, double radius, double kappa, double max_dual) {
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
  const Output<T> first{pointer<T>(value), pointer<T>(lam), pointer<T>(nu), pointer<T>(weights),
                        pointer<int32_t>(status), pointer<int32_t>(passes)};
  const auto solve = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Row<T> row{loss + r * n, cost ? cost + r * n : nullptr, kept ? kept + r * n : nullptr, n};
      solve_row(row, family, radius, kappa, max_dual, rows == 1,
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
  const Family family(static_cast<Kind>(divergence), alpha);
  if (losses.scalar_type() == ScalarType::Float) return run<float>(losses, costs, clean, family, radius, kappa, max_dual);
  STD_TORCH_CHECK(losses.scalar_type() == ScalarType::Double, "armor::dual: losses must be float32 or float64");
  return run<double>(losses, costs, clean, family, radius, kappa, max_dual);
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
