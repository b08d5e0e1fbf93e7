// The dual of one row as a scalar state machine (docs/solver.md tells why it looks like this). It asks for sums over
// the row at a point (b, mu), and from the sums decides on the next point or stops; the loops over the row are the
// business of the CPU and CUDA kernels that drive it.
//
// Units: losses are shifted by the row's maximum and divided by its range; kappa, max_dual and mu are divided by the
// range too. Everything is float64, whatever the dtype of the row.
#pragma once

#include "armor/divergence.h"
#include "armor/root.h"

namespace armor {

struct Problem {
  Family family;
  double radius, kappa, max_dual;
  double tolerance;   // on the budget: |D(q) + E_q[c] - radius| <= tolerance * radius
  bool costs, clean;  // are there transport costs; may a sample stay clean instead
};

// What is known of a row before its first evaluation.
struct Moments {
  double n, ties;    // samples; how many attain the maximum
  double mean, std;  // of the scaled losses that can be had
  double mean_cost;
};

// The sample with the largest v = loss - mu cost: z = v - top.v <= 0 and d = cost - top.cost are measured from it.
struct Top {
  double v = -kInf, cost = 0.0;

  ARMOR_FN void add(const Top& o) {
    if (o.v > v) *this = o;
  }
};

// Sums over a row of the weight w = w(b z) times products of z, d and g = d log w / d(b z).
struct Sums {
  double w = 0.0, wz = 0.0, wzg = 0.0, wzzg = 0.0;
  double wd = 0.0, wdg = 0.0, wzdg = 0.0, wddg = 0.0;  // stay zero without costs
  double z_min = 0.0, d_min = 0.0;  // the smallest z whose weight is not zero, and its d
  double z_out = -kInf;             // the largest z whose weight is zero

  ARMOR_FN void add(const Sums& o) {
    w += o.w, wz += o.wz, wzg += o.wzg, wzzg += o.wzzg;
    wd += o.wd, wdg += o.wdg, wzdg += o.wzdg, wddg += o.wddg;
    if (o.z_min < z_min) z_min = o.z_min, d_min = o.d_min;
    z_out = fmax(z_out, o.z_out);
  }
};

// In scaled units. The weights are w(b z) / sum w(b z); b = inf puts all mass on the maximum.
struct Answer {
  double value, mu, b;
  Status status;
};

// nu, the multiplier of "the weights sum to one", in the units of a = losses / mu - costs. `top` is the largest
// loss - mu cost, and mu and b are in the units of the losses too.
ARMOR_FN double multiplier(const Family& f, double top, double mu, double b, double log_mean_weight) {
  if (mu == 0.0) return top > 0.0 ? kInf : top < 0.0 ? -kInf : 0.0;
  if (f.kind == Kind::kl) return (mu < kInf ? top / mu : 0.0) + log_mean_weight;
  if (mu == kInf || b == 0.0) return (mu < kInf ? top / mu : 0.0) - 1.0 / f.k;  // uniform weights
  return (top - 1.0 / (f.k * b)) / mu;
}

// Does a sample move, or is it better off clean? Ties move.
ARMOR_FN bool moves(double loss, double mu, double cost, double clean) { return loss - mu * cost >= clean; }

class DualSolver {
 public:
  static constexpr int kMaxRounds = 400;

  double b, mu;  // the point to evaluate next

  ARMOR_FN DualSolver(const Problem& problem, const Moments& moments) : p(problem), row(moments) {
    const Family& f = p.family;
    target = f.to_log_form(p.radius);
    const double largest = f.largest_log_form(row.n, row.ties);
    radius_binds = p.costs || target < largest - 1e-14 * fmin(largest, 1e300);
    y_min = log(p.costs ? fmax(p.kappa, kNoDual) : p.kappa);
    y_max = p.costs ? fmax(log(p.max_dual), y_min) : kInf;
    const double budget = p.costs ? f.to_log_form(p.radius - fmin(row.mean_cost, 0.7 * p.radius)) : target;
    double start = sqrt(2.0 * budget) / row.std;  // D = b^2 Var / 2 to first order, for every family
    if (f.kind == Kind::renyi) start = exp(straight(budget)) * sqrt(2.0 / pace()) / row.std;
    if (f.kind == Kind::alpha) start = -expm1(-f.k * start) / f.k;
    if (!radius_binds) start = kInf;
    if (p.kappa > 0.0) start = fmin(start, 1.0 / p.kappa);
    const double mu_start = f.kind == Kind::alpha ? row.std / sqrt(2.0 * budget) : 1.0 / start;
    start = clamp(start, 1e-100, 1e100);
    go(log(start), clamp(log(mu_start), fmax(y_min, -230.0), fmin(y_max, 230.0)));
  }

  ARMOR_FN const Family& family() const { return p.family; }

  // All mass may sit on the maximum and nothing regularises it: there is nothing to search for.
  ARMOR_FN bool trivial() const { return !radius_binds && p.kappa == 0.0; }

  // Takes the sums at (b, mu). True when that point is the answer; else (b, mu) is the next point.
  ARMOR_FN bool update(const Sums& s, const Top& top) {
    const Family& f = p.family;
    const double k = f.k;
    ++round;
    s0 = s.w / row.n;
    mean = s.wz / s.w;
    divergence = f.from_log_form(f.log_form(b, s0, mean));
    top_v = top.v;
    top_loss = top.v + mu * top.cost;
    const double mean_d = s.wd / s.w, mean_zg = s.wzg / s.w, mean_dg = s.wdg / s.w;
    const double optimal_mu = f.dual(b, s0, mean);
    if (!p.costs) mu = optimal_mu, y = log(mu);
    // d log w / dx = b z g and d log w / dy = -b mu d g, hence these covariances of z and d with them
    const double zx = b * (s.wzzg / s.w - mean * mean_zg), zy = -b * mu * (s.wzdg / s.w - mean * mean_dg);
    const double dx = b * (s.wzdg / s.w - mean_d * mean_zg), dy = -b * mu * (s.wddg / s.w - mean_d * mean_dg);
    // off = log(optimal mu / mu) is zero on the curve of pairs where the weights are optimal for mu
    off = {f.kind == Kind::kl ? 0.0 : log(optimal_mu / mu), -1.0, -1.0};
    if (f.kind == Kind::alpha) off.x += k * b * mean_zg, off.y -= k * b * mu * mean_dg;
    if (f.kind == Kind::renyi) off.x = (k * zx - 1.0 / b) / optimal_mu, off.y += k * (zy - mu * mean_d) / optimal_mu;
    budget = {divergence + top.cost + mean_d, zx / optimal_mu + dx, zy / optimal_mu + dy};

    if (!nested && p.costs && (p.clean || k > 1.0 || round > 20 || !(off.y < -0.2))) {
      nested = true;
      if (y < y_min || y > y_max) return go(x, clamp(y, y_min, y_max));
    }
    return nested ? update_nested(s) : update_joint(s);
  }

  ARMOR_FN Answer answer(bool converged) const {
    const Family& f = p.family;
    if (trivial()) return {0.0, 0.0, kInf, Status::saturated};
    const double power_mean = s0 * (1.0 + f.k * b * mean);
    const bool cusps = f.kind == Kind::alpha && f.k > 1.0;
    double m = mu;
    if (active == Active::kappa) {
      m = fmax(p.kappa, p.costs ? kNoDual : 0.0);
    } else if (!p.costs && cusps) {  // the best mu for this b in closed form, whatever the cusps do to the weights
      m = exp(f.k / (1.0 + f.k) * (log(power_mean) - log1p(f.k * (1.0 + f.k) * p.radius))) / b;
    } else if (!p.costs && converged) {
      m *= exp(clamp(-off.x / off.y * step, -0.1, 0.1));  // the Newton step that the tolerance spared
    }
    const bool sharp = !cusps && converged && fabs(off.value) <= 1e-6;
    const double penalised = sharp ? mean - m * divergence : f.objective(m, b, 0.0, s0, power_mean);
    const double value = top_v + penalised + (m > p.kappa ? (m - p.kappa) * p.radius : 0.0);
    const Status status = !converged                  ? Status::not_converged
                          : active == Active::ceiling ? Status::max_dual
                          : active == Active::kappa && p.kappa == 0.0 ? Status::saturated
                                                                      : Status::converged;
    if (status == Status::saturated) return {top_loss, 0.0, b, status};
    return {value, m, b, status};
  }

 private:
  struct Gradient {
    double value, x, y;
  };
  struct Tangent {
    double mu, value, slope;
  };
  enum class Active { radius, kappa, ceiling };       // what holds mu where it is
  static constexpr double kNoDual = 1e-13;            // with costs, mu = 1e-13 of the range stands for zero

  Problem p;
  Moments row;
  double target;      // the radius in log form
  bool radius_binds;  // false where the radius allows all mass on the maximum
  double x, y;        // log b, log mu
  double y_min, y_max;
  double s0 = 1.0, mean = 0.0, divergence = 0.0, top_v = 0.0, top_loss = 0.0, step = 0.0;
  Gradient off, budget;
  Active active = Active::radius;
  int round = 0, nested_round = 0;
  bool nested = false;
  Bracket bracket;       // of x in the joint search; of x at a fixed y in the nested one
  Bracket outer;         // of y in the nested search
  Tangent left{}, right{};  // of the convex dual function, below and above its minimum

  // Moves on, unless this was the last round: the answer then is the point that the sums belong to.
  ARMOR_FN bool go(double x_next, double y_next) {
    if (round >= kMaxRounds) return false;
    x = p.family.kind == Kind::kl ? -y_next : x_next;
    y = y_next;
    b = exp(x), mu = exp(y);
    return false;
  }

  // A coordinate in which the log form is nearly straight in log b: small radii have R ~ b^2, large ones R ~ log b, and
  // the pace joins the two slopes.
  ARMOR_FN double pace() const {
    const double k = p.family.k;
    return k < 0.0 ? 2.0 * fmax(1.0, k * k) : 2.0 * (1.0 + k);
  }
  ARMOR_FN double straight(double r) const {
    const double scaled = pace() * r;
    return scaled > 600.0 ? 0.5 * scaled : 0.5 * log(expm1(scaled));
  }

  // Newton in x = log b, with y kept on the curve. The root is the least x at which the budget is spent or mu has
  // fallen to kappa, and at least the x at which mu comes down to max_dual.
  ARMOR_FN bool update_joint(const Sums& s) {
    const Family& f = p.family;
    const double dy_dx = -off.x / off.y, y_curve = y - off.value / off.y;
    const double spent = budget.value - budget.y * off.value / off.y;
    const double r = f.to_log_form(spent), c = f.kind == Kind::alpha ? f.k * (1.0 + f.k) : 0.0;
    const double slope = (budget.x + budget.y * dy_dx) / (1.0 + c * spent);
    bool done = false;
    double excess = -kInf;
    step = kInf, active = Active::radius;
    if (radius_binds) {
      done = fabs(r - target) <= fmax(p.tolerance * target, 4e-15);
      if (r > 0.0) excess = straight(r) - straight(target);
      if (f.kind == Kind::kl)  // sqrt(R) is nearly straight in b itself
        step = log(fmax(1.0 + 2.0 * (sqrt(fmax(target * r, 0.0)) - r) / slope, 1e-3));
      else
        step = excess * expm1(-pace() * r) / (0.5 * pace() * slope);
    }
    const double to_kappa = (y_min - y_curve) / dy_dx, to_ceiling = (y_max - y_curve) / dy_dx;
    if (!(step <= to_kappa)) step = to_kappa, active = Active::kappa, done = fabs(y_min - y_curve) <= p.tolerance;
    if (step < to_ceiling) step = to_ceiling, active = Active::ceiling, done = fabs(y_max - y_curve) <= p.tolerance;
    excess = fmin(fmax(excess, y_min - y_curve), y_max - y_curve);
    const bool on_curve = fabs(off.value) <= p.tolerance;
    const bool at_floor = p.costs && y <= y_min && r < target, at_ceiling = p.costs && y >= y_max && r > target;
    if (at_floor || at_ceiling) {  // mu can go no further: meet the curve at this mu
      if (on_curve) return stop_at(at_floor ? Active::kappa : Active::ceiling);
      return go(x - clamp(off.value / off.x, -3.0, 3.0), y);
    }
    if (done && on_curve) return true;
    double x_next = x;
    if (on_curve || (fabs(off.value) <= 0.1 && square(off.value) <= 0.1 * fabs(excess))) {
      bracket.tighten(x, excess);
      if (bracket.exhausted()) return true;
    }
    if (fabs(off.value) <= 0.3) {
      const double t = clamp(step, -5.0, 5.0);
      x_next = bracket.next(t < 0.0 ? across_truncation(s, t, r, slope)
                                    : towards_truncation(s, t, y_curve + dy_dx * t));
    }
    return go(x_next, clamp(y_curve + dy_dx * (x_next - x), fmax(y_min, y - 6.0), fmin(y_max, y + 6.0)));
  }

  // The same root where the joint search may fail (the budget can jump when `clean` samples change sides): the dual
  // function is convex in mu, so bracket y, and at each y bracket x.
  ARMOR_FN bool update_nested(const Sums& s) {
    const Family& f = p.family;
    const double slope = budget.y - budget.x * off.y / off.x;            // along the curve, per y
    const double spent = budget.value - budget.x * off.value / off.x;    // where the curve is met at this y
    const double excess = spent - p.radius;
    if (nested_round++ == 0) bracket = Bracket();
    bracket.tighten(x, -off.value);
    const bool on_curve = fabs(off.value) <= p.tolerance || (f.kind != Kind::kl && bracket.exhausted());
    active = Active::radius;
    if (on_curve) {
      if (fabs(excess) <= fmax(p.tolerance * p.radius, 1e-15)) return true;
      if (excess < 0.0 && y <= y_min) return stop_at(Active::kappa);
      if (excess > 0.0 && y >= y_max) return stop_at(Active::ceiling);
    }
    double y_next = y;
    if (on_curve || (nested_round < 40 && fabs(off.value) <= 0.3)) {
      if (on_curve || (!p.clean && spent > 0.0 && fabs(off.value) <= 0.1 &&
                       square(off.value) <= 0.1 * fabs(log(spent / p.radius)))) {
        outer.tighten(y, sqrt(p.radius) - sqrt(fmax(spent, 0.0)));
        if (on_curve) {
          const double value = top_v + f.objective(mu, b, p.radius, s0, s0 * (1.0 + f.k * b * mean));
          (excess > 0.0 ? left : right) = {mu, value, p.radius - budget.value};
          if (outer.closed() && (outer.exhausted() || kink_resolved(value))) return true;
        }
      }
      double dy = excess > 0.0 ? 3.0 : -3.0;
      if (slope < 0.0 && spent > 0.0) dy = clamp(2.0 * (sqrt(p.radius * spent) - spent) / slope, -3.0, 3.0);
      const double newton = clamp(y + dy, y_min, y_max);
      const bool inside = outer.lo < newton && newton < outer.hi;
      const bool known = left.mu > 0.0 && right.mu > 0.0;
      y_next = clamp(outer.next(inside || !known ? newton : log(tangents_meet())), y_min, y_max);
    }
    if (nested_round == 40) outer = Bracket();
    const double dy = y_next - y;
    const double x_next = towards_truncation(s, -(off.value + off.y * dy) / off.x, y_next);
    if (f.kind == Kind::kl) return go(x, y_next);
    if (dy == 0.0) return go(bracket.next(clamp(x_next, x - 3.0, x + 3.0)), y);
    bracket = Bracket();
    return go(clamp(x_next, x - 6.0, x + 6.0), y_next);
  }

  ARMOR_FN bool stop_at(Active what) {
    active = what;
    return true;
  }

  // x + t; for k > 1 (alpha > 2) with the step measured in the weight of the sample next to be truncated, because that
  // weight, (1 + k b z)^(1/k), has a vertical tangent where it vanishes.
  ARMOR_FN double towards_truncation(const Sums& s, double t, double y_next) const {
    const double k = p.family.k, u = 1.0 + k * b * s.z_min;
    if (!(k > 1.0 && u > 0.0 && u < 1.0)) return x + t;
    const double factor = 1.0 + b * (s.z_min * t - mu * s.d_min * (y_next - y)) / u;
    const double z_next = s.z_min - (s.d_min == 0.0 ? 0.0 : (exp(y_next) - mu) * s.d_min);
    const double u_next = factor > 0.0 ? u * exp(k * log(factor)) : 0.0;
    return u_next > 0.0 && u_next < 1.0 && z_next < 0.0 ? log((u_next - 1.0) / (k * z_next)) : x + t;
  }

  // The same going left, where the step meets the sample that comes back first: its weight lowers the log form r, whose
  // slope is d r / dx, by weight / (n k s0), so the weight that the root needs, and with it b, is known beforehand.
  ARMOR_FN double across_truncation(const Sums& s, double t, double r, double slope) const {
    const double k = p.family.k, without = towards_truncation(s, t, y);
    if (!(k > 1.0 && s.z_out > -kInf) || p.costs) return without;
    const double at = -log(-k * s.z_out), weight = (r + slope * (at - x) - target) * row.n * k * s0;
    if (without > at || !(weight < 1.0)) return without;
    return weight > 0.0 ? at + log1p(-exp(k * log(weight))) : at;
  }

  // Where the tangents meet is the least value the dual function can still have between them.
  ARMOR_FN double tangents_meet() const {
    return (right.value - left.value + left.slope * left.mu - right.slope * right.mu) / (left.slope - right.slope);
  }
  // A tie between moving a sample and leaving it clean is a kink of the dual function: its budget jumps there.
  ARMOR_FN bool kink_resolved(double value) const {
    const double least = left.value + left.slope * (tangents_meet() - left.mu);
    return p.clean && left.mu > 0.0 && right.mu > 0.0 && value - least <= fmax(1e-3 * p.tolerance, 1e-15);
  }
};

}  // namespace armor
