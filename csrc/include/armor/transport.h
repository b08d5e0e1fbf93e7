// Transport, element by element (docs/math.md, section 5): the random numbers of a start and the formulas of a step.
// Framework-free, for host and device; sums over a sample are the caller's.
#pragma once

#include <cstring>

#include "armor/divergence.h"

namespace armor::transport {

enum class Transport : int { linf, l2, l1, norm_power, soft_ball, binary };
enum class Start : int { linf, l2, l1, gaussian, clean };  // a ball to be uniform in, or a distribution
enum class Stream : uint32_t { noise, rounding, extra };
constexpr int kBadGradient = 1, kOutside = 2;  // bits of the status
constexpr double kMaxMu = 1e30;

// ---- random numbers

struct Words {
  uint32_t w0, w1, w2, w3;
};

// Philox4x32-10 of Salmon et al. (2011).
ARMOR_FN Words philox(uint64_t seed, uint64_t counter, Stream stream) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  Words w{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), static_cast<uint32_t>(stream), 0};
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t a = uint64_t{0xD2511F53u} * w.w0, b = uint64_t{0xCD9E8D57u} * w.w2;
    w = {static_cast<uint32_t>(b >> 32) ^ w.w1 ^ k0, static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ w.w3 ^ k1, static_cast<uint32_t>(a)};
  }
  return w;
}

// The middle of one of 2^23 intervals of (0, 1); 24 bits, so 2u - 1 is exact, too.
ARMOR_FN float uniform(uint32_t word) { return (static_cast<int32_t>(word >> 9) + 0.5f) * 0x1p-23f; }

// -log u for 0 < u < 1 (Cephes' logf).
ARMOR_FN float exponential(float u) {
  int32_t bits;
  std::memcpy(&bits, &u, sizeof bits);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // the mantissa is to lie in [sqrt(1/2), sqrt(2))
  bits -= exponent * (1 << 23);
  float mantissa;
  std::memcpy(&mantissa, &bits, sizeof mantissa);
  const float x = mantissa - 1.0f, e = static_cast<float>(exponent);
  float poly = 7.0376836292e-2f;
  poly = poly * x - 1.1514610310e-1f;
  poly = poly * x + 1.1676998740e-1f;
  poly = poly * x - 1.2420140846e-1f;
  poly = poly * x + 1.4249322787e-1f;
  poly = poly * x - 1.6668057665e-1f;
  poly = poly * x + 2.0000714765e-1f;
  poly = poly * x - 2.4999993993e-1f;
  poly = poly * x + 3.3333331174e-1f;
  const float tail = poly * x * x * x - 2.12194440e-4f * e - 0.5f * x * x;
  return -(x + tail + 0.693359375f * e);
}

struct Circle {
  float cos, sin;
};

// cos and sin of 2 pi u for 0 < u < 1: the nearest quarter turn is taken off exactly (polynomials of Cephes).
ARMOR_FN Circle on_circle(float u) {
  const int32_t quarter = static_cast<int32_t>(4.0f * u + 0.5f);
  const float t = (u - 0.25f * quarter) * 6.283185307179586f, t2 = t * t;
  const float s = ((-1.9515295891e-4f * t2 + 8.3321608736e-3f) * t2 - 1.6666654611e-1f) * t2 * t + t;
  const float c = ((2.443315711809948e-5f * t2 - 1.388731625493765e-3f) * t2 + 4.166664568298827e-2f) * t2 * t2 -
                  0.5f * t2 + 1.0f;
  const bool odd = quarter & 1;
  const float cos = odd ? s : c, sin = odd ? c : s;
  return {(quarter + 1) & 2 ? -cos : cos, quarter & 2 ? -sin : sin};
}

// Two independent normal numbers (Box and Muller).
ARMOR_FN Circle gaussians(uint32_t w0, uint32_t w1) {
  const float length = sqrtf(2.0f * exponential(uniform(w0)));
  const Circle at = on_circle(uniform(w1));
  return {length * at.cos, length * at.sin};
}

// ---- one element of a step; R is float or double

// size * sign(v)
template <class R>
ARMOR_FN R along(R v, R size) {
  return v != 0 ? std::copysign(size, v) : R(0);
}

// NaN stays NaN, as in torch.clamp.
template <class R>
ARMOR_FN R clip(R v, R lo, R hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

template <class R>
ARMOR_FN R linf_step(R x_adv, R g, R x, R step_size, R radius, R lo, R hi) {
  const R y = x_adv + along(g, step_size);
  return clip(clip(x == x ? y : x, x - radius, x + radius), lo, hi);
}

// May x_adv still follow g?
template <class R>
ARMOR_FN bool feasible(R x_adv, R g, R lo, R hi) {
  return ((g > 0) & (x_adv < hi)) | ((g < 0) & (x_adv > lo));
}

// A displacement in the projection on an l1 ball and the box: `left` is its size less the ball's multiplier, `cap` the
// way to the box.
template <class R>
ARMOR_FN R shrunk(R left, R cap) {
  const R inside = left > 0 ? left : R(0);
  return cap < inside ? cap : inside;
}

// d beyond the ball of the given radius; 0 inside.
template <class R>
ARMOR_FN R beyond(R d, R radius) {
  return std::fabs(d) <= radius ? R(0) : d - std::copysign(radius, d);
}

// The penalty's gradient is taken at the ascended point, or (early) at the one before.
template <class R>
ARMOR_FN R soft_ball_step(R x_adv, R g, R x, R step_size, R rate, R radius, bool early) {
  const R d = x_adv - x, ascended = d + along(g, step_size);
  return x + (ascended - rate * beyond(early ? d : ascended, radius));
}

}  // namespace armor::transport
