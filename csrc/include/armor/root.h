// The safeguard of every root search here: a bracket around the root of an increasing function, which accepts a
// Newton candidate where it can and interpolates, halves or expands where it cannot. Shared by CPU and CUDA.
#pragma once

#include "armor/divergence.h"

namespace armor {

struct Bracket {
  double lo = -kInf, hi = kInf;        // f(lo) <= 0 < f(hi)
  double f_lo = -kInf, f_hi = kInf;
  double last_f = kInf;
  int last_side = 0, stalled = 0;

  ARMOR_FN bool closed() const { return lo > -kInf && hi < kInf; }
  ARMOR_FN bool exhausted() const { return hi - lo <= 1e-15 * fmax(1.0, fabs(closed() ? hi : 0.0)); }

  ARMOR_FN void tighten(double x, double f) {
    const double width = hi - lo;
    const int side = f > 0.0 ? 1 : -1;
    if (side > 0) {
      hi = x, f_hi = f;
      if (last_side > 0) f_lo *= 0.5;  // Illinois: an end that stays twice weighs half
    } else {
      lo = x, f_lo = f;
      if (last_side < 0) f_hi *= 0.5;
    }
    stalled = hi - lo > 0.5 * width && closed() && fabs(f) > 0.5 * last_f ? stalled + 1 : 0;
    last_side = side, last_f = fabs(f);
  }

  // The next point: `candidate` when it lies inside, else one from the bracket. NaN candidates count as outside.
  ARMOR_FN double next(double candidate) {
    if (lo < candidate && candidate < hi && stalled < 3) return candidate;
    if (!closed()) return lo > -kInf ? lo + 0.7 : hi - 1.4;
    double share = f_lo > -kInf && f_hi < kInf ? f_lo / (f_lo - f_hi) : 0.5;
    if (stalled >= 3 || !(share >= 0.0 && share <= 1.0)) share = 0.5, stalled = 0;
    return lo + clamp(share, 0.05, 0.95) * (hi - lo);
  }
};

}  // namespace armor
