// The three divergences as one power family (docs/math.md, section 2). Framework-free: CPU and CUDA share this file.
//
// The worst-case weights of a row are w(b z) / sum w(b z), where z <= 0 is the loss below its row's maximum and
//     w(y) = (1 + k y)_+^(1/k),      k = 0 (KL: exp y),   k = alpha - 1 (alpha),   k = -alpha (Renyi),
// so one number b > 0 carries the multiplier of the normalisation, and it grows with the radius from 0 (uniform).
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(ARMOR_HOST_SHIM)
#define ARMOR_FN __host__ __device__ inline
#else
#define ARMOR_FN inline
#endif

namespace armor {

enum class Kind : int { kl = 0, alpha = 1, renyi = 2 };
enum class Status : int { converged = 0, saturated = 1, max_dual = 2, nonfinite = 3, not_converged = 4 };

constexpr double kInf = HUGE_VAL;

ARMOR_FN double square(double x) { return x * x; }
ARMOR_FN double clamp(double x, double lo, double hi) { return fmin(fmax(x, lo), hi); }

struct Family {
  Kind kind;
  double k;

  ARMOR_FN Family(Kind kind_, double alpha)
      : kind(kind_), k(kind_ == Kind::kl ? 0.0 : kind_ == Kind::alpha ? alpha - 1.0 : -alpha) {}

  // Log form R of a divergence D, and back: T = mean w^(1+k) is 1 + k(1+k) D for alpha and exp(k(1+k) D) for Renyi;
  // R = log T / (k(1+k)) is the number that both have in common, and D itself for KL and Renyi.
  ARMOR_FN double to_log_form(double d) const {
    const double c = k * (1.0 + k);
    return kind == Kind::alpha && c > 0.0 ? log1p(c * d) / c : d;
  }
  ARMOR_FN double from_log_form(double r) const {
    const double c = k * (1.0 + k);
    return kind == Kind::alpha && c > 0.0 ? expm1(c * r) / c : r;
  }
  // Log form of the weights w(b z) with mean w = s0 and weighted mean of z = m.
  ARMOR_FN double log_form(double b, double s0, double m) const {
    if (k == 0.0) return b * m - log(s0);
    return (log1p(k * b * m) / k - log(s0)) / (1.0 + k);
  }
  // The largest log form there is: all mass on `ties` of n samples.
  ARMOR_FN double largest_log_form(double n, double ties) const {
    return k <= -1.0 ? kInf : log(n / ties) / (1.0 + k);
  }
  // The dual variable mu for which w(b z) are the optimal weights of sup E_q[z] - mu D(q).
  ARMOR_FN double dual(double b, double s0, double m) const {
    if (kind == Kind::kl) return 1.0 / b;
    if (kind == Kind::alpha) return exp(k * log(s0)) / b;
    return (1.0 + k * b * m) / b;
  }
  // Dual objective mu (radius + Phi(z / mu)) at ANY pair (mu, b), an upper bound of the value; power_mean = mean
  // w^(1+k). It does not need the pair to be normalised, so it stays exact where the weights are ill-conditioned.
  ARMOR_FN double objective(double mu, double b, double radius, double s0, double power_mean) const {
    if (kind == Kind::kl) return mu * (radius + log(s0));
    if (kind == Kind::alpha) {
      const double alpha = 1.0 + k;
      return mu * radius + (mu / alpha - 1.0 / b) / k + mu / alpha * power_mean * exp(-alpha / k * log(b * mu));
    }
    const double alpha = -k;
    return mu * radius + 1.0 / (alpha * b) + mu * ((log(b * mu) - 1.0) / alpha - log(power_mean) / (alpha - 1.0));
  }
};

}  // namespace armor
