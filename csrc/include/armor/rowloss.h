// Per-sample losses of logits and their gradients (docs/math.md, section 4): cross-entropy, TRADES, MART and KL.
// Framework-free: the CPU and CUDA kernels loop over classes and add up the parts below; everything that is per row
// happens here, in float64, and everything that is per class is a term of Terms and a line of Slopes.
#pragma once

#include "armor/divergence.h"

namespace armor {

enum class Loss : int { ce = 0, trades = 1, mart = 2, kl = 3 };

constexpr int64_t kIgnoreNothing = INT64_MIN;
constexpr double kFloor = 1e-12;                  // what MART adds to a probability before its logarithm,
constexpr double kLogFloor = -27.631021115928547;

struct LossSettings {
  Loss kind;
  double beta, smoothing;
  int64_t ignore_index;  // of cross-entropy

  ARMOR_FN bool has_natural() const { return kind != Loss::ce; }
  ARMOR_FN bool ignores(int64_t target) const { return kind == Loss::ce && target == ignore_index; }
  ARMOR_FN int stats_width() const { return kind == Loss::ce ? 2 : kind == Loss::mart ? 7 : 5; }
};

ARMOR_FN bool is_class(int64_t target, int64_t classes) { return target >= 0 && target < classes; }

// All rows of one call. z are `logits` (the adversarial ones), w the `natural` ones, null for cross-entropy.
template <class L, class T>
struct Rowlosses {
  const L *logits, *natural;  // [rows, classes]
  const int64_t* target;
  T *losses, *stats;          // [rows], [rows, stats_width]
  int64_t rows, classes;
  LossSettings settings;
};

// All that the backward pass reads and writes. With `weights`, `grad` belongs to rows of `samples` losses each. The
// gradient of the natural logits is null where it is not wanted.
template <class L, class T>
struct RowlossGradients {
  const T *grad, *weights;
  const L *logits, *natural;
  const int64_t* target;
  const T* stats;
  L *to_logits, *to_natural;
  int64_t rows, classes, samples;
  LossSettings settings;

  ARMOR_FN T upstream(int64_t r) const { return weights ? grad[r / samples] * weights[r] : grad[r]; }
};

// ---- what a kernel adds up over the classes of a row, in this order -------------------------------------------------

// First look: the largest logits, and for MART the rival, the first of the largest z that is not the target's.
struct Peaks {
  double z = -kInf, w = -kInf;
  double rival_z = -kInf, rival = kInf;

  ARMOR_FN void look(double class_, bool is_target, double z_k, double w_k) {
    z = fmax(z, z_k), w = fmax(w, w_k);
    if (is_target || !(z_k > rival_z || rival == kInf)) return;
    rival_z = z_k == z_k ? z_k : -kInf, rival = class_;
  }
  ARMOR_FN void add(const Peaks& o) {
    z = fmax(z, o.z), w = fmax(w, o.w);
    if (o.rival_z > rival_z || (o.rival_z == rival_z && o.rival < rival)) rival_z = o.rival_z, rival = o.rival;
  }
};

// Sum of exp(x - max x). The classes that attain the maximum are counted, so that what the others add to them keeps its
// digits when it is tiny: the loss of a confident, right prediction is just that.
struct Mass {
  double ties = 0.0, below = 0.0;

  ARMOR_FN void add(const Mass& o) { ties += o.ties, below += o.below; }
  ARMOR_FN double sum() const { return ties + below; }
  ARMOR_FN double log_sum() const {
    const double rest = (ties - 1.0) + below;
    return rest > 0.5 ? log(1.0 + rest) : log1p(rest);  // log is the faster one
  }
};

// Second look, at b = z - max z and a = w - max w. Parts hold doubles only, so that they travel as such.
struct Totals {
  Mass z, w;
  double cross = 0.0;    // sum of exp(a) (a - b), from which KL follows
  double centred = 0.0;  // sum of b, for label smoothing

  template <class R>
  ARMOR_FN void look(const LossSettings& s, R b, R a) {
    const R e = exp(b);
    (b == R(0) ? z.ties : z.below) += e;
    if (s.kind == Loss::ce) centred += b;
    if (!s.has_natural()) return;
    const R f = exp(a);
    (a == R(0) ? w.ties : w.below) += f;
    if (s.kind != Loss::mart && f != R(0)) cross += f * (a - b);
  }
  ARMOR_FN void add(const Totals& o) {
    z.add(o.z), w.add(o.w);
    cross += o.cross, centred += o.centred;
  }
};

// What is known of a row: first written by the forward pass, and as stats [width] kept for the backward one.
struct RowStats {
  double max_z, log_z;  // log_z = log sum exp(z - max z)
  double max_w = 0.0, log_w = 0.0, kl = 0.0;
  double rival = 0.0, overlap = 0.0;  // of MART: the strongest wrong class, and sum p q / (q + 1e-12)

  ARMOR_FN RowStats(const LossSettings& s, const Peaks& peaks, const Totals& t) : max_z(peaks.z), log_z(t.z.log_sum()) {
    if (!s.has_natural()) return;
    max_w = peaks.w, log_w = t.w.log_sum();
    if (s.kind == Loss::mart) rival = peaks.rival;
    else kl = t.cross / t.w.sum() - (log_w - log_z);
  }

  template <class T>
  ARMOR_FN RowStats(const LossSettings& s, const T* stats) : max_z(stats[0]), log_z(stats[1]) {
    if (s.has_natural()) max_w = stats[2], log_w = stats[3], kl = stats[4];
    if (s.kind == Loss::mart) rival = stats[5], overlap = stats[6];
  }
  template <class T>
  ARMOR_FN void store(const LossSettings& s, T* stats) const {
    const double all[] = {max_z, log_z, max_w, log_w, kl, rival, overlap};
    for (int i = 0; i < s.stats_width(); ++i) stats[i] = static_cast<T>(all[i]);
  }

  ARMOR_FN double log_q(double z_k) const { return (z_k - max_z) - log_z; }
  ARMOR_FN double log_p(double w_k) const { return (w_k - max_w) - log_w; }
};

// log(q + kFloor), which loses no digits of log q where q is close to 1.
template <class R>
ARMOR_FN R log_with_floor(R q, R log_q) {
  const R floor = static_cast<R>(kFloor);
  return q > floor ? log_q + log1p(floor / q) : static_cast<R>(kLogFloor) + log1p(q / floor);
}

// One class: its probabilities, h = log p - log q (MART: - log(q + 1e-12)), and shared = p q / (q + 1e-12).
template <class R>
struct Terms {
  R p, q, h, shared;

  ARMOR_FN Terms(const LossSettings& s, R log_q, R log_p) : p(exp(log_p)), q(exp(log_q)), h(0), shared(0) {
    if (!s.has_natural()) return;
    const bool mart = s.kind == Loss::mart;
    if (p != R(0)) h = log_p - (mart ? log_with_floor(q, log_q) : log_q);
    if (mart) shared = p * (q / (q + static_cast<R>(kFloor)));
  }
};

// Third look, of MART alone: KL and the overlap need the normalised probabilities.
struct Overlap {
  double kl = 0.0, shared = 0.0;

  template <class R>
  ARMOR_FN void look(const Terms<R>& t) {
    kl += t.p * t.h, shared += t.shared;
  }
  ARMOR_FN void add(const Overlap& o) { kl += o.kl, shared += o.shared; }
};

// ---- what follows for the row ---------------------------------------------------------------------------------------

// MART's 1.0001 - q_rival + 1e-12 and 1.0000001 - p_target, with 1 - q by expm1, because q may be close to 1.
ARMOR_FN double margin(double log_q_rival) { return (1e-4 - expm1(log_q_rival)) + kFloor; }
ARMOR_FN double doubt(double log_p_target) { return 1e-7 - expm1(log_p_target); }

// The logits that a row needs one by one: of its target, and for MART of its rival.
struct Marked {
  double z_target, w_target, z_rival;
};

ARMOR_FN double loss_of(const LossSettings& s, const RowStats& r, const Marked& m, double centred, double classes) {
  const double nll = -r.log_q(m.z_target);
  switch (s.kind) {
    case Loss::ce:
      return s.smoothing == 0.0 ? nll : (1.0 - s.smoothing) * nll + s.smoothing * (r.log_z - centred / classes);
    case Loss::trades:
      return s.beta * r.kl - r.log_p(m.w_target);
    case Loss::mart:
      return nll - log(margin(r.log_q(m.z_rival))) + s.beta * r.kl * doubt(r.log_p(m.w_target));
    default:
      return r.kl;
  }
}

// The gradient of a row as coefficients of the Terms of a class. `target` and `rival` come on top in the classes of the
// same name; there the sum may be close to zero, so kernels form it in float64.
template <class R>
struct Slopes {
  R q, gap = 0, shared = 0, shift = 0, target = 0, rival = 0;  // of the gradient in z_k; gap is of q - p
  R natural = 0, natural_h = 0, natural_target = 0;            // of the gradient in w_k,
  R kl;                                                        // where h is measured from KL: both may be huge

  ARMOR_FN Slopes(const LossSettings& s, const RowStats& r, const Marked& m, double upstream, double classes)
      : q(0), kl(r.kl) {
    const double scale = s.kind == Loss::kl ? upstream : upstream * s.beta;
    if (s.kind == Loss::ce) {
      q = upstream, target = -upstream * (1.0 - s.smoothing);
      if (s.smoothing != 0.0) shift = -upstream * s.smoothing / classes;  // 0 where the upstream is infinite
    } else if (s.kind == Loss::mart) {
      const double log_q_rival = r.log_q(m.z_rival), log_p_target = r.log_p(m.w_target);
      const double by_doubt = scale * doubt(log_p_target), by_target = scale * r.kl * exp(log_p_target);
      rival = upstream * exp(log_q_rival) / margin(log_q_rival), target = -upstream;
      q = upstream - rival + by_doubt * r.overlap, shared = -by_doubt;
      natural = by_target, natural_h = by_doubt, natural_target = -by_target;
    } else {
      gap = natural_h = scale;
      natural = s.kind == Loss::trades ? upstream : 0.0, natural_target = -natural;
    }
  }
  template <class Wide>
  ARMOR_FN explicit Slopes(const Slopes<Wide>& o)
      : q(o.q), gap(o.gap), shared(o.shared), shift(o.shift), target(o.target), rival(o.rival), natural(o.natural),
        natural_h(o.natural_h), natural_target(o.natural_target), kl(o.kl) {}

  ARMOR_FN R to_logits(const Terms<R>& t, bool is_target, bool is_rival) const {
    const R rest = (is_target ? target : R(0)) + (is_rival ? rival : R(0)) + shift;
    return q * t.q + gap * (t.q - t.p) + shared * t.shared + rest;
  }
  ARMOR_FN R to_natural(const Terms<R>& t, bool is_target) const {
    const R rest = is_target ? natural_target : R(0);
    return t.p == R(0) ? rest : t.p * (natural + natural_h * (t.h - kl)) + rest;
  }
};

}  // namespace armor
