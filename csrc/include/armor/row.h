// One row from raw losses to raw results: what the first look at it must find, its scaling, the rows that need no
// search, the search, and the way back. The CPU and CUDA kernels loop over samples; everything that is per row happens
// here.
#pragma once

#include "armor/dual.h"

namespace armor {

struct Settings {
  Family family;
  double radius, kappa, max_dual, tolerance;
  bool costs, clean;
};

// All rows of one call; costs and clean may be null.
template <class T>
struct Rows {
  const T *losses, *costs, *clean;  // [rows, n]
  T *value, *lam, *nu, *weights;
  int *status, *passes;
  int64_t rows, n;
  Settings settings;
};

// All that the backward pass reads and writes; costs and clean, and their gradients, may be null.
template <class T>
struct Gradients {
  const T *grad, *mu, *weights, *losses, *costs, *clean;
  T *to_losses, *to_costs, *to_clean;
  int64_t rows, n;

  // Sample i of row r: its weight, on the branch that it took (docs/math.md, section 1).
  ARMOR_FN void write(int64_t r, int64_t i) const {
    const T gw = grad[r] * weights[i];
    const bool moved = !clean || moves(losses[i], mu[r], costs ? costs[i] : T(0), clean[i]);
    to_losses[i] = moved ? gw : T(0);
    if (costs) to_costs[i] = moved && weights[i] != T(0) ? -mu[r] * gw : T(0);
    if (clean) to_clean[i] = moved ? T(0) : gw;
  }
};

// What one look over the samples finds. With `clean`, a loss here is the larger of the sample's two. A sample whose
// cost is +inf cannot move: its clean loss counts, and without one it is not usable.
struct Scan {
  double usable = 0.0;
  double max = -kInf, min = kInf, ties = 0.0;
  double sum = 0.0, sum_squares = 0.0, sum_cubes = 0.0;  // of loss - origin
  double cost_sum = 0.0;
  double defect = 0.0;  // NaN if an entry that counts is not finite

  // One more sample. `cost` is 0 where there are none.
  ARMOR_FN void look(double loss, double cost, bool has_clean, double clean, double origin) {
    const bool barred = cost == kInf && loss == loss;
    if (!barred) defect += (loss + cost) * 0.0;
    if (has_clean) defect += clean * 0.0;
    if (barred && !has_clean) return;
    if (barred) loss = clean;
    const double best = has_clean ? fmax(loss, clean) : loss, centred = best - origin;
    merge_extremes(best, has_clean ? fmin(loss, clean) : loss, 1.0);
    usable += 1.0, cost_sum += barred ? 0.0 : cost;
    sum += centred, sum_squares += square(centred), sum_cubes += square(centred) * centred;
  }

  ARMOR_FN void merge_extremes(double other_max, double other_min, double other_ties) {
    ties = other_max > max ? other_ties : other_max == max ? ties + other_ties : ties;
    max = fmax(max, other_max);
    min = fmin(min, other_min);
  }
  ARMOR_FN void add(const Scan& o) {
    merge_extremes(o.max, o.min, o.ties);
    usable += o.usable, cost_sum += o.cost_sum, defect += o.defect;
    sum += o.sum, sum_squares += o.sum_squares, sum_cubes += o.sum_cubes;
  }
};

// A scaled loss is (loss * unit - max) * inverse_range; unit is 1, or 1/2 where the range would overflow.
struct Scaling {
  double unit = 1.0, max = 0.0, inverse_range = 1.0;
};

// The loss from which sums of a row are measured: its first, if that is one.
ARMOR_FN double origin_of(double first) { return fabs(first) < kInf ? first : 0.0; }

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

  ARMOR_FN RowSolver(const Settings& settings, const Scan& scan_, double n_, double origin)
      : scan(scan_), n(n_), radius(settings.radius), kappa(settings.kappa), costs(settings.costs),
        spread(fit(scan_, scaling)), mass(n_), solver(problem(settings), moments(settings, origin)) {
    point.k = settings.family.k;
    point.top = {0.0, 0.0};
    const bool equal = scan.max - scan.min < kTiny;
    searching = costs || !(radius == 0.0 || equal || nearly_uniform(scaled_mean(origin)));
    if (!costs && (equal || radius == 0.0)) {  // uniform weights: the mean, or the one loss there is
      const double mean = equal ? 0.0 : scaled_mean(origin);
      const bool saturated = equal && kappa == 0.0;
      answer = {mean, equal ? to_scaled(kappa) : kInf, 0.0, saturated ? Status::saturated : Status::converged};
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
    const double unit = scaling.unit, mu = answer.mu * spread / unit;
    const double top = (scaling.max + point.top.v * spread) / unit;
    if (searching) mass = answer.b == kInf ? scan.ties : sums.w;
    const double log_mean = answer.b == kInf ? 0.0 : log(mass / n);
    return {(scaling.max + answer.value * spread) / unit, fmax(mu - kappa, 0.0),
            multiplier(solver.family(), top, mu, answer.b / spread * unit, log_mean), 1.0 / mass, answer.status};
  }

 private:
  static constexpr double kTiny = 1e-290;  // a smaller range counts as none: its inverse would overflow

  Scan scan;
  double n, radius, kappa;
  bool costs;
  double spread;  // the range, times scaling.unit
  double mass;    // sum of w(b z)
  DualSolver solver;
  Sums sums;
  Answer answer{};
  bool searching, converged = false;

  ARMOR_FN static double fit(const Scan& s, Scaling& out) {
    out.unit = s.max - s.min < kInf ? 1.0 : 0.5;
    out.max = s.max * out.unit;
    const double spread = out.max - s.min * out.unit;
    out.inverse_range = spread < kTiny ? 1.0 : 1.0 / spread;
    return spread < kTiny ? 1.0 : spread;
  }

  // Where b is so small that the sums would lose their digits (radius << 1, or kappa >> range), its first powers have
  // them all: Phi(a) = mean + Var / 2 + (1 - k) kappa_3 / 6 + ... for every family.
  ARMOR_FN bool nearly_uniform(double scaled_mean) {
    const double k = point.k, mean = scan.sum / n, variance = fmax(scan.sum_squares / n - square(mean), 0.0);
    const double third = scan.sum_cubes / n - mean * (3.0 * variance + square(mean));
    const double std = to_scaled(sqrt(variance)), scaled_kappa = to_scaled(kappa);
    const double by_radius = sqrt(2.0 * radius) / std, b = fmin(by_radius, 1.0 / scaled_kappa);
    if (!(b < 3e-5 && std < kInf)) return false;
    const double skew = third / variance / sqrt(variance), asymmetry = skew == skew ? (1.0 - k) * skew / 6.0 : 0.0;
    double value = scaled_mean + 0.5 * b * square(std) + asymmetry * square(b * std) * std;
    if (b == by_radius) value += (1.0 / b - scaled_kappa) * radius;
    answer = {value, 1.0 / b, b, Status::converged};
    mass = n * (1.0 + b * scaled_mean + 0.5 * (1.0 - k) * square(b) * (square(std) + square(scaled_mean)));
    return true;
  }

  ARMOR_FN double to_scaled(double in_units_of_the_losses) const {
    return in_units_of_the_losses * scaling.unit * scaling.inverse_range;
  }
  ARMOR_FN double scaled_mean(double first) const {
    return ((scan.sum / scan.usable + first) * scaling.unit - scaling.max) * scaling.inverse_range;
  }

  ARMOR_FN Problem problem(const Settings& s) const {
    return {s.family, s.radius, to_scaled(s.kappa), to_scaled(s.max_dual), s.tolerance, s.costs, s.clean};
  }

  ARMOR_FN Moments moments(const Settings& s, double first) const {
    const double mean = scan.sum / scan.usable, variance = fmax(scan.sum_squares / scan.usable - square(mean), 0.0);
    // A range of one implies a standard deviation of 1/2 n^-1/2 at least, and 1/2 at most; with costs the losses may
    // all be equal.
    const double least = s.costs ? 1e-3 : 0.5 / sqrt(n);
    return {n, scan.ties, scaled_mean(first), clamp(to_scaled(sqrt(variance)), least, 0.5),
            s.clean ? kInf : scan.cost_sum / scan.usable};
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
