// One row from raw losses to raw results: what the first look at it must find, its scaling, the rows that need no search,
// the search, and the way back. The CPU and CUDA kernels loop over samples; everything that is per row happens here.
#pragma once

#include "armor/dual.h"

namespace armor {

struct Settings {
  Family family;
  double radius, kappa, max_dual, tolerance;
  bool costs, clean;
};

// What one look over the samples [0, n) finds. With `clean`, a loss here is the larger of the sample's two.
struct Scan {
  double max = -kInf, min = kInf, ties = 0.0;
  double sum = 0.0, sum_squares = 0.0;  // of loss - losses[0]
  double cost_sum = 0.0;
  double defect = 0.0;  // NaN if an entry is not finite (a cost may be +inf)

  ARMOR_FN void merge_extremes(double other_max, double other_min, double other_ties) {
    ties = other_max > max ? other_ties : other_max == max ? ties + other_ties : ties;
    max = fmax(max, other_max);
    min = fmin(min, other_min);
  }
  ARMOR_FN void add(const Scan& o) {
    merge_extremes(o.max, o.min, o.ties);
    sum += o.sum, sum_squares += o.sum_squares, cost_sum += o.cost_sum, defect += o.defect;
  }
};

// A scaled loss is (loss * unit - max) * inverse_range; unit is 1, or 1/2 where the range would overflow.
struct Scaling {
  double unit = 1.0, max = 0.0, inverse_range = 1.0;
};

// Where the sums are wanted.
struct Point {
  double b = 0.0, mu = 0.0, k = 0.0;
  Top top;
};

struct Result {
  double value, lam, nu;
  double weight_scale;  // weights are w(b z) times this
  Status status;
};

class RowSolver {
 public:
  Scaling scaling;
  Point point;
  int passes = 1, round = 0;
  bool done;

  ARMOR_FN RowSolver(const Settings& settings, const Scan& scan_, double n_, double first)
      : scan(scan_), n(n_), radius(settings.radius), kappa(settings.kappa), costs(settings.costs),
        range(fit(scan_, scaling)), solver(problem(settings), moments(settings, first)) {
    point.k = settings.family.k;
    point.top = {0.0, 0.0};
    const bool equal = scan.max - scan.min < kTiny;
    searching = costs || !(radius == 0.0 || equal);
    if (!searching) {  // uniform weights: the mean, or the one loss there is
      const double mean = equal ? 0.0 : (scan.sum / n + first - scan.max) / range;
      const bool saturated = equal && kappa == 0.0;
      answer = {mean, equal ? kappa / range : kInf, 0.0, saturated ? Status::saturated : Status::converged};
    }
    done = !searching || solver.trivial();
    next();
  }

  // With costs, the caller first finds the top at point.mu; then the sums at the point.
  ARMOR_FN void update(const Sums& s, const Top& top) {
    passes += costs ? 2 : 1;
    sums = s;
    point.top = top;
    converged = solver.update(s, top);
    done = converged || ++round >= DualSolver::kMaxRounds;
    next();
  }

  ARMOR_FN Result result() {
    ++passes;
    if (searching) answer = solver.answer(converged || solver.trivial());
    point.b = answer.b;
    const double mu = answer.mu * range, top = scan.max + point.top.v * range;
    const double mass = answer.b == kInf ? scan.ties : answer.b == 0.0 ? n : sums.w;
    return {scan.max + answer.value * range, fmax(mu - kappa, 0.0),
            multiplier(solver.family(), top, mu, answer.b / range, answer.b == kInf ? 0.0 : log(mass / n)), 1.0 / mass,
            answer.status};
  }

 private:
  static constexpr double kTiny = 1e-290;  // a smaller range counts as none: its inverse would overflow

  Scan scan;
  double n, radius, kappa;
  bool costs;
  double range;
  DualSolver solver;
  Sums sums;
  Answer answer{};
  bool searching, converged = false;

  ARMOR_FN static double fit(const Scan& s, Scaling& out) {
    out.unit = s.max - s.min < kInf ? 1.0 : 0.5;
    out.max = s.max * out.unit;
    const double spread = out.max - s.min * out.unit;
    out.inverse_range = spread < kTiny ? 1.0 : 1.0 / spread;
    return (spread < kTiny ? 1.0 : spread) / out.unit;
  }

  ARMOR_FN Problem problem(const Settings& s) const {
    return {s.family, s.radius, s.kappa / range, s.max_dual / range, s.tolerance, s.costs, s.clean};
  }

  ARMOR_FN Moments moments(const Settings& s, double first) const {
    const double mean = scan.sum / n, variance = fmax(scan.sum_squares / n - square(mean), 0.0);
    // A range of one implies a standard deviation of 1/2 n^-1/2 at least; with costs the losses may be all equal.
    const double least = s.costs ? 1e-3 : 0.5 / sqrt(n);
    return {n, scan.ties, (mean + first - scan.max) / range, fmax(sqrt(variance) / range, least),
            s.clean ? kInf : scan.cost_sum / n};
  }

  ARMOR_FN void next() {
    point.b = solver.b;
    point.mu = costs ? solver.mu : 0.0;
  }
};

// The entry by which a row with NaN or inf is answered: NaN wins over +inf, and +inf over -inf, as in a mean. A sample
// that may not move counts as -inf unless it has a clean loss.
ARMOR_FN double deciding_entry(double loss, double cost, bool has_clean, double clean) {
  if (loss != loss || !(cost > -kInf)) return NAN;
  if (cost == kInf) loss = -kInf;
  return !has_clean ? loss : clean != clean ? NAN : fmax(loss, clean);
}

}  // namespace armor
